import math
from itertools import product

import numpy
import pytest
import spacy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from spacy.tokens import Doc, Span
from spacy.training import Example

from lookup_ner import example, learn, pipeline, trained
from scripts.pipeline.token_ner import (
    MASKED,
    PADDING,
    TagScores,
    decode_iob2,
    negative_log_likelihood,
    segment_probabilities,
    tag_sequences,
)

TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def is_valid_iob2(tags):
    return all(t[0] != "I" or (before[1:] == t[1:]) for before, t in zip(("O", *tags), tags, strict=False))


@pytest.fixture
def nlp():
    return pipeline()


def floats(*shape):
    return arrays("float32", shape, elements=st.floats(-8, 8, width=32))


def total(emissions, transitions, start, ids):
    """The score of one sequence of tag ids, straight from the model's definition."""
    pairs = sum(transitions[before, after] for before, after in zip(ids, ids[1:], strict=False))
    return start[ids[0]] + sum(emissions[row, tag] for row, tag in enumerate(ids)) + pairs


def valid_sequences(length):
    every = product(range(len(TAGS)), repeat=length)
    return [ids for ids in every if is_valid_iob2([TAGS[i] for i in ids])]


batches = st.lists(st.integers(1, 6).flatmap(lambda tokens: floats(tokens, len(TAGS))), min_size=1, max_size=3)
parameters = (floats(len(TAGS), len(TAGS)), floats(len(TAGS)))


@settings(max_examples=60, deadline=None)
@given(batches, *parameters)
def test_decoding_finds_the_best_valid_sequence_of_all(batch, transitions, start):
    for emissions, decoded in zip(batch, decode_iob2(batch, transitions, start), strict=True):
        valid = valid_sequences(len(emissions))
        assert tuple(decoded) in valid
        best = max(total(emissions, transitions, start, ids) for ids in valid)
        assert total(emissions, transitions, start, decoded) == pytest.approx(best, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(batches, *parameters, st.data())
def test_the_loss_is_minus_the_log_of_the_gold_tags_share_of_all_valid_sequences(batch, transitions, start, data):
    gold, expected = [], 0.0
    for emissions in batch:
        valid = valid_sequences(len(emissions))
        tags = list(data.draw(st.sampled_from(valid)))
        hidden = data.draw(st.sets(st.integers(0, len(tags) - 1)))
        tags = [MASKED if i in hidden else tag for i, tag in enumerate(tags)]
        scores = {ids: float(total(emissions.astype("float64"), transitions, start, ids)) for ids in valid}
        agreeing = [
            score for ids, score in scores.items() if all(t in (MASKED, i) for t, i in zip(tags, ids, strict=True))
        ]
        expected += numpy.logaddexp.reduce(list(scores.values())) - numpy.logaddexp.reduce(agreeing)
        gold.append(tags)
    tensors = torch.nn.utils.rnn.pad_sequence([torch.tensor(emissions) for emissions in batch], batch_first=True)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(tags) for tags in gold], True, PADDING)
    loss = negative_log_likelihood(tensors, torch.tensor(transitions), torch.tensor(start), padded)
    assert float(loss) == pytest.approx(expected, abs=1e-3)


def tag_scores(ner, *tags):
    """Scores that say exactly these tags of each Doc, and nothing where a tag is None."""
    size = len(ner.tags)
    emissions = [numpy.array([[9 * (tag == t) for t in ner.tags] for tag in some], dtype="float32") for some in tags]
    return TagScores(emissions, numpy.zeros((size, size), dtype="float32"), numpy.zeros(size, dtype="float32"))


@pytest.mark.parametrize(
    ("words", "tags", "entities"),
    [
        (["\n", "Bari", "e"], ["B-LOC", "B-LOC", "O"], [(1, 2)]),
        (["Bari", " ", "e", "\n"], ["B-LOC", "I-LOC", "O", "I-LOC"], [(0, 1)]),
        (["Bari", "\n", "vecchia"], ["B-LOC", "O", "I-LOC"], [(0, 3)]),
        (["Bari|", "\n"], ["B-LOC", "I-LOC"], [(0, 1)]),
        (["Bari|", "\n|", "Roma"], ["B-LOC", "O", "B-LOC"], [(0, 1), (2, 3)]),
        (["Bari", "\n\n", "vecchia"], ["B-LOC", "I-LOC", "B-LOC"], [(0, 1), (2, 3)]),
        (["Bari|", "\t|", "Roma"], ["B-LOC", "O", "I-LOC"], [(0, 1)]),
    ],
)
def test_no_entity_begins_or_ends_in_white_space_or_crosses_an_empty_line(nlp, words, tags, entities):
    trained(nlp, steps=0)
    ner = nlp.get_pipe("ner")
    # | stands where no space follows
    doc = Doc(nlp.vocab, words=[word.strip("|") for word in words], spaces=[word[-1] != "|" for word in words])
    ner.set_annotations([doc], tag_scores(ner, tags))
    assert [(ent.start, ent.end) for ent in doc.ents] == entities


@pytest.mark.parametrize(
    ("words", "units"),
    [
        ("nell'|Italia |centro|-|settentrionale", "nell'|Italia |centro-settentrionale"),
        ("L'|Aquila |D'|Annunzio", "L'|Aquila |D'|Annunzio"),
        ("Rod |Laver4|-|6", "Rod |Laver4-6"),
        ("Roma|- |Bari |- |Po", "Roma|- |Bari |- |Po"),
        ("Nuoro|/|Bari|–|Po|_", "Nuoro|/|Bari|–|Po|_"),
        ("*|*|Bari|*|*", "*|*|Bari|*|*"),
        ("10|km |میان\u200cدورود", "10km |میان\u200cدورود"),
        ("(|Bari|)|,", "(|Bari|)|,"),
        ("'|Bari|' |e", "'|Bari|' |e"),
        ("''|'|Bari|''|'", "'''|Bari|'''"),
        ("Rjazan'|''", "Rjazan'|''"),
        ("''|Bari|''|6|-|4", "''|Bari|''|6-4"),
        ("F|. |Neri", "F. |Neri"),
        ("Serie |B|.", "Serie |B|."),
        ("Belgio|●|, |Bari", "Belgio|●|, |Bari"),
        ("Bari|¹|, |e", "Bari|¹|, |e"),
        ("-|Bari|- |❤\ufe0f|e", "-|Bari|- |❤\ufe0f|e"),
    ],
)
def test_what_panx_has_as_one_word_gets_one_tag(words, units):
    parts = words.split("|")
    doc = Doc(spacy.blank("it").vocab, words=[p.strip() for p in parts], spaces=[p.endswith(" ") for p in parts])
    (sequence,) = tag_sequences(doc)
    assert [doc[start:end].text for start, end in sequence] == [unit.strip() for unit in units.split("|")]


def test_a_hyphenated_word_is_found_as_a_whole(nlp):
    words, spaces = ["centro", "-", "nord", "oggi"], [False, False, True, False]
    examples = [*trained(nlp, steps=0), example(nlp, words, ["O", "O", "B-LOC", "O"], spaces)]
    learn(nlp, examples)
    assert [ent.text for ent in nlp(Doc(nlp.vocab, words=words, spaces=spaces)).ents] == ["centro-nord"]


@settings(max_examples=40, deadline=None)
@given(batches, *parameters, st.floats(0.5, 3), st.data())
def test_an_entitys_probability_is_its_share_of_all_valid_sequences(batch, transitions, start, temperature, data):
    segments, expected = [], []
    for emissions in batch:
        valid = valid_sequences(len(emissions))
        weights = [math.exp(total(emissions.astype("float64"), transitions, start, ids) / temperature) for ids in valid]
        first = data.draw(st.integers(0, len(emissions) - 1))
        last, label = data.draw(st.integers(first + 1, len(emissions))), data.draw(st.integers(0, 1))
        wanted = (1 + 2 * label, *[2 + 2 * label] * (last - first - 1))
        having = [ids[first:last] == wanted and ids[last : last + 1] != (2 + 2 * label,) for ids in valid]
        segments.append([(first, last, label)])
        expected.append([sum(w for w, there in zip(weights, having, strict=True) if there) / sum(weights)])
    found = segment_probabilities(batch, transitions, start, segments, temperature)
    for some, others in zip(found, expected, strict=True):
        assert some == pytest.approx(others, rel=1e-3, abs=1e-9)


def test_entities_have_a_score_and_other_spans_have_none(nlp):
    trained(nlp)
    doc = Doc(nlp.vocab, words=["Anna", "Neri", "vive", "a", "Bari", "e", "Bari"])
    doc.ents = [Span(doc, 4, 5, label="BRAND")]
    nlp(doc)
    scores = {ent.text + ent.label_: ent._.panx_score for ent in doc.ents}
    assert set(scores) == {"Anna NeriPER", "BariBRAND", "BariLOC"}
    assert scores["BariBRAND"] is None
    assert 0.5 < scores["Anna NeriPER"] < 1
    assert doc[0:1]._.panx_score is None
    assert Span(doc, 0, 2, label="BRAND")._.panx_score is None  # such as one that a later ruler has relabelled
    assert Span(doc, 0, 2, label="PER")._.panx_score == scores["Anna NeriPER"]


def test_entities_less_probable_than_the_threshold_are_left_out(nlp, tmp_path):
    trained(nlp)
    nlp.to_disk(tmp_path)
    words = ["Anna", "Neri", "vive", "a", "Bari"]
    scores = {ent.text: ent._.panx_score for ent in nlp(Doc(nlp.vocab, words=words)).ents}
    likely = max(scores, key=scores.get)
    loaded = spacy.load(tmp_path, config={"components.ner.threshold": scores[likely]})
    assert [ent.text for ent in loaded(Doc(loaded.vocab, words=words)).ents] == [likely]
    with pytest.raises(ValueError, match="threshold of the pipe 'ner' is 90, expected a probability"):
        spacy.load(tmp_path, config={"components.ner.threshold": 90})


def test_loss_is_the_mean_over_annotated_tokens_and_the_others_may_have_any_tag(nlp):
    trained(nlp, steps=1)
    ner = nlp.get_pipe("ner")
    reference = Doc(nlp.vocab, words=["Bari", "e", "Ugo"])
    reference.set_ents([Span(reference, 0, 1, label="LOC"), Span(reference, 2, 3, label="PER")], default="missing")
    partly = Example(Doc(nlp.vocab, words=["Bari", "e", "Ugo"]), reference)
    every, gold = valid_sequences(3), (ner.tags.index("B-LOC"), ner.tags.index("B-PER"))
    agreeing = [ids for ids in every if (ids[0], ids[2]) == gold]
    loss, _ = ner.get_loss([partly], tag_scores(ner, [None] * 3))
    assert loss == pytest.approx(math.log(len(every) / len(agreeing)) / 2, rel=1e-5)


def test_a_batch_of_white_space_has_no_loss(nlp):
    trained(nlp, steps=1)
    assert nlp.update([example(nlp, ["\n"], ["O"])])["ner"] == 0


def test_a_gold_label_that_the_pipe_does_not_know_is_an_error_that_names_it(nlp):
    trained(nlp, steps=1)
    with pytest.raises(ValueError, match="B-ORG.*LOC, PER"):
        nlp.update([example(nlp, ["Eni"], ["B-ORG"])])


def test_entities_and_blocked_tokens_of_earlier_pipes_are_kept_and_the_rest_is_labelled(nlp):
    trained(nlp)
    doc = Doc(nlp.vocab, words=["Anna", "Neri", "vive", "a", "Bari", "e", "Bari"])
    doc.set_ents([Span(doc, 1, 3, label="BRAND", kb_id="Q1")], blocked=[doc[4:5]], default="missing")
    nlp(doc)
    assert [(e.text, e.label_, e.kb_id_) for e in doc.ents] == [
        ("Anna", "PER", ""),
        ("Neri vive", "BRAND", "Q1"),
        ("Bari", "LOC", ""),
    ]
    assert doc.ents[2].start == 6
    assert (doc[4].ent_iob_, doc[4].ent_type_) == ("B", "")  # blocked for later pipes too


def test_a_label_added_to_a_trained_pipe_leaves_its_scores_and_can_be_learned(nlp):
    examples = trained(nlp)
    ner = nlp.get_pipe("ner")
    doc = Doc(nlp.vocab, words=["Anna", "Neri", "vive", "a", "Bari"])
    before = ner.predict([doc])
    assert ner.add_label("ORG") == 1
    assert ner.add_label("ORG") == 0
    after = ner.predict([doc])
    assert numpy.array_equal(after.emissions[0][:, :5], before.emissions[0])
    assert numpy.array_equal(after.transitions[:5, :5], before.transitions)
    examples.append(example(nlp, ["Eni", "e", "Ugo"], ["B-ORG", "O", "B-PER"]))
    learn(nlp, examples)
    assert nlp.evaluate(examples)["ents_f"] == 1.0


@pytest.mark.parametrize("label", ["", None, 3])
def test_a_label_is_a_non_empty_string(nlp, label):
    with pytest.raises(ValueError, match="non-empty string"):
        nlp.get_pipe("ner").add_label(label)


def test_initialize_needs_a_label_and_takes_some_that_the_examples_lack(nlp):
    with pytest.raises(ValueError, match="ner"):
        nlp.initialize(lambda: [example(nlp, ["oggi"], ["O"])])
    ner = nlp.get_pipe("ner")
    ner.initialize(lambda: [example(nlp, ["Bari"], ["B-LOC"])], nlp=nlp, labels=["LOC", "ORG"])
    assert ner.labels == ner.label_data == ("LOC", "ORG")
    assert ner.tags == ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG")
