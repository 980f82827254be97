import numpy
import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.scorer import get_ner_prf
from spacy.tokens import Doc
from spacy.training import Example

from scripts.evaluate import score_raw_text, score_seqeval

VOCAB = spacy.blank("it").vocab
LABELS = ("PER", "ORG", "LOC")


@st.composite
def tagged(draw, size):
    """Valid IOB2 tags for `size` tokens."""
    tags = []
    for _ in range(size):
        inside = [] if not tags or tags[-1] == "O" else ["I-" + tags[-1][2:]]
        tags.append(draw(st.sampled_from(["O", *(f"B-{label}" for label in LABELS), *inside])))
    return tags


pairs = st.lists(st.integers(1, 8).flatmap(lambda size: st.tuples(tagged(size), tagged(size))), min_size=1, max_size=6)


def doc(tags):
    return Doc(VOCAB, words=[f"w{i}" for i in range(len(tags))], ents=tags)


@settings(deadline=None)
@given(pairs)
def test_seqeval_and_spacy_give_the_same_score(pairs):
    gold, predicted = [doc(tags) for tags, _ in pairs], [doc(tags) for _, tags in pairs]
    spacys = get_ner_prf([Example(p, g) for g, p in zip(gold, predicted, strict=True)])
    seqevals = score_seqeval(gold, predicted)
    for key in ("ents_p", "ents_r", "ents_f"):
        assert seqevals[key] == pytest.approx(spacys[key] or 0.0, abs=1e-9)


@pytest.fixture
def ruler():
    """A pipeline with the Italian tokenizer that knows a few names."""
    nlp = spacy.blank("it")
    nlp.add_pipe("entity_ruler").add_patterns(
        [
            {"label": "LOC", "pattern": "Bari"},
            {"label": "ORG", "pattern": "Eni"},
            {"label": "PER", "pattern": [{"TEXT": "Anna"}, {"TEXT": "Neri"}]},
        ]
    )
    return nlp


def gold(words, tags, spaces=None):
    return Doc(VOCAB, words=words, ents=tags, spaces=spaces or [True] * (len(words) - 1) + [False])


def test_raw_text_is_scored_by_characters_whatever_the_tokens(ruler):
    # the gold sentence has one token where the pipeline's tokenizer makes two
    docs = [
        gold(["Anna", "Neri", "(Bari)"], ["B-PER", "I-PER", "O"]),
        gold(["Eni", "."], ["B-ORG", "O"], [False, False]),
    ]
    scores = score_raw_text(ruler, docs)
    assert (scores["ents_p"], scores["ents_r"]) == (2 / 3, 1.0)
    assert scores["ents_per_type"]["LOC"] == {"p": 0.0, "r": 0.0, "f": 0.0}
    assert scores["ents_per_type"]["PER"]["f"] == 1.0


@pytest.mark.parametrize(
    ("words", "tags"),
    [(["a", "Bari"], ["O", "B-ORG"]), (["a", "Bari"], ["B-LOC", "I-LOC"]), (["Bari", "vecchia"], ["B-LOC", "I-LOC"])],
)
def test_another_label_or_another_character_is_wrong(ruler, words, tags):
    assert score_raw_text(ruler, [gold(words, tags)])["ents_f"] == 0.0


def test_gold_docs_are_left_as_they_were(ruler):
    docs = [gold(["Bari"], ["B-LOC"])]
    before = numpy.array(docs[0].to_array(["ENT_IOB", "ENT_TYPE"]))
    score_raw_text(ruler, docs)
    assert (docs[0].to_array(["ENT_IOB", "ENT_TYPE"]) == before).all()
