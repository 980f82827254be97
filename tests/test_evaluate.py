import pytest
import spacy
from spacy.tokens import Doc

from benchmarks.running_text import make_gold
from lookup_ner import ruler
from scripts.evaluate import score_overlaps, score_raw_text, score_running_text
from scripts.panx import Sentence
from scripts.pipeline.token_ner import SCORED

VOCAB = spacy.blank("it").vocab
PROBABILITIES = {"Bari": 0.95, "Eni": 0.4, "Anna Neri": 0.75}


@spacy.Language.component("set_probabilities")
def set_probabilities(doc):
    for ent in doc.ents:
        ent._.set(SCORED, (ent.label_, PROBABILITIES[ent.text]))
    return doc


@pytest.fixture
def nlp():
    """A pipeline with the Italian tokenizer that knows a few names, each with a probability."""
    nlp = ruler({"Bari": "LOC", "Eni": "ORG", "Anna Neri": "PER"})
    nlp.add_pipe("set_probabilities")
    return nlp


def gold(words, tags, spaces=None):
    return Doc(VOCAB, words=words, ents=tags, spaces=spaces or [True] * (len(words) - 1) + [False])


def test_raw_text_is_scored_by_characters_whatever_the_tokens(nlp):
    # the gold sentence has one token where the pipeline's tokenizer makes two
    docs = [
        gold(["Anna", "Neri", "(Bari)"], ["B-PER", "I-PER", "O"]),
        gold(["Eni", "."], ["B-ORG", "O"], [False, False]),
    ]
    scores = score_raw_text(nlp, docs)
    assert (scores["ents_p"], scores["ents_r"]) == (2 / 3, 1.0)
    assert scores["ents_per_type"]["LOC"] == {"p": 0.0, "r": 0.0, "f": 0.0}
    assert scores["ents_per_type"]["PER"]["f"] == 1.0


@pytest.mark.parametrize(
    ("words", "tags"),
    [(["a", "Bari"], ["O", "B-ORG"]), (["a", "Bari"], ["B-LOC", "I-LOC"]), (["Bari", "vecchia"], ["B-LOC", "I-LOC"])],
)
def test_another_label_or_another_character_is_wrong(nlp, words, tags):
    assert score_raw_text(nlp, [gold(words, tags)])["ents_f"] == 0.0


def test_entities_inside_glued_tokens_count_only_where_panx_has_an_entity(nlp):
    untagged, tagged, other = (["O", "O"], ["O", "B-ORG"], ["O", "B-LOC"])
    docs = [gold(["conti", "dell'Eni"], tags) for tags in (untagged, tagged)] + [gold(["a", "Bari"], other)]
    scores = score_raw_text(nlp, docs)
    assert (scores["ents_p"], scores["ents_r"]) == (1 / 3, 0.5)
    assert (scores["without_glued"]["ents_p"], scores["without_glued"]["ents_r"]) == (0.5, 0.5)


def test_an_overlap_of_one_character_counts_where_the_label_is_the_same():
    expected = [{(0, 9, "PER"), (20, 24, "LOC")}, {(0, 4, "LOC")}]
    found = [{(8, 12, "PER"), (20, 24, "ORG")}, {(4, 8, "LOC")}]
    assert score_overlaps(expected, found) == pytest.approx({"ents_p": 1 / 3, "ents_r": 1 / 3, "ents_f": 1 / 3})
    assert score_overlaps([set()], [set()]) == {"ents_p": 0.0, "ents_r": 0.0, "ents_f": 0.0}


def test_running_text_has_recall_after_elisions_false_entities_and_coverage(nlp):
    # four names, of which two follow an elision, and nine tokens in texts without any
    texts = [
        gold(["dell'", "Eni"], ["O", "B-ORG"], [False, False]),
        gold(["dell’", "Anna"], ["O", "B-PER"], [False, False]),
        gold(["Anna", "Neri"], ["B-PER", "I-PER"]),
        gold(["Bari"], ["B-LOC"]),
        gold(["Bari", "contro", "Bari"], ["O"] * 3),
        gold(["oggi", "non", "piove", "a", "lungo", "."], ["O"] * 6),
    ]
    running = score_running_text(nlp, texts)
    assert (running["after_elision"], running["elsewhere"]) == (0.5, 1.0)
    assert running["overlap"]["ents_r"] == running["ents_r"] == 0.75
    assert running["overlap"]["ents_p"] == running["ents_p"] == 0.6
    assert running["false_per_1000"] == pytest.approx(1000 * 2 / 9)
    rows = {threshold: figures for threshold, *figures in running["coverage"]}
    assert rows[0.0] == [0.6, 0.75]
    assert rows[0.5] == [0.5, 0.5]  # without Eni
    assert rows[0.8] == [pytest.approx(1 / 3), 0.25]  # Bari alone
    assert rows[0.99] == [1.0, 0.0]


def test_text_without_entities_has_scores_too(nlp):
    scores = score_running_text(nlp, [gold(["oggi"], ["O"])])
    assert (scores["ents_f"], scores["after_elision"], scores["false_per_1000"]) == (0.0, 0.0, 0.0)
    assert {(precision, recall) for _, precision, recall in scores["coverage"]} == {(1.0, 0.0)}
    assert "coverage" not in score_running_text(ruler({"Bari": "LOC"}), [gold(["Bari"], ["B-LOC"])])


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("as it is", "L'Aquila, dell’Eni po' ß (Bari)."),
        ("in capitals", "L'AQUILA, DELL’ENI PO' ß (BARI)."),
        ("in lower case", "l'aquila, dell’eni po' ß (bari)."),
    ],
)
def test_running_text_is_joined_by_rule_and_keeps_its_entities_in_any_letter_case(nlp, case, text):
    words = ["L'", "Aquila", ",", "dell’", "Eni", "po'", "ß", "(", "Bari", ")", "."]
    tags = ["B-LOC", "I-LOC", "O", "O", "B-ORG", *["O"] * 3, "B-LOC", "O", "O"]
    (doc,) = make_gold(nlp, [Sentence(tuple(words), tuple(tags))], case)
    assert doc.text == text
    assert [(ent.start, ent.end, ent.label_) for ent in doc.ents] == [(0, 2, "LOC"), (4, 5, "ORG"), (8, 9, "LOC")]
