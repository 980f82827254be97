import re

import pytest
import spacy
from spacy.tokens import Doc

from scripts import report
from scripts.pipeline.token_ner import SCORED

WORDS = ["Anna", "Neri", "lavora", "alla", "Banca", "Rossi", "di", "Bari", "oggi"]
VOCAB = spacy.blank("it").vocab
TRAINING = [
    {"step": step, "training_loss": 1 / step, "validation_loss": 2 / step, "ents_f": step / 10} for step in (1, 2, 3)
]


def sentence(*ents, words=WORDS, scores=()):
    """A sentence with entities given as (first token, token after the last, label), and their probabilities."""
    doc = Doc(VOCAB, words=words)
    doc.ents = [doc.char_span(doc[a].idx, doc[b - 1].idx + len(doc[b - 1]), label=label) for a, b, label in ents]
    for ent, score in zip(doc.ents, scores, strict=False):
        ent._.set(SCORED, (ent.label_, score))
    return doc


GOLD = sentence((0, 2, "PER"), (4, 6, "ORG"), (7, 8, "LOC"))
PREDICTED = sentence((0, 2, "PER"), (4, 5, "LOC"), (6, 9, "LOC"), scores=[0.9, 0.6, 0.8])


def errors_of(gold, predicted):
    return [pair.title for pair in report.pair_entities([gold], [predicted]) if pair.is_error]


def test_each_error_is_told_once_with_what_stands_there_instead():
    assert errors_of(GOLD, PREDICTED) == ["ORG “Banca Rossi” → LOC “Banca”", "LOC “Bari” → LOC “di Bari oggi”"]
    assert errors_of(sentence(), sentence((0, 1, "PER"))) == ["nothing → PER “Anna”"]
    assert errors_of(sentence((0, 1, "PER")), sentence()) == ["PER “Anna” → nothing"]
    assert errors_of(GOLD, GOLD) == []


def test_confusion_counts_what_was_taken_for_what():
    spurious = sentence((2, 3, "ORG"))
    pairs = report.pair_entities([GOLD, sentence()], [PREDICTED, spurious])
    table = report.confusion(list(pairs), ["LOC", "ORG", "PER"])
    assert table["columns"] == ["LOC", "ORG", "PER", "nothing"]
    assert dict(table["rows"]) == {
        "LOC": [1, 0, 0, 0],
        "ORG": [1, 0, 0, 0],
        "PER": [0, 0, 1, 0],
        "nothing": [0, 1, 0, 0],
    }


@pytest.mark.parametrize(
    ("predicted", "kind"),
    [((4, 6), "exact"), ((4, 5), "too short"), ((3, 7), "too long"), ((5, 7), "shifted")],
)
def test_boundaries_are_compared_where_the_type_is_the_same(predicted, kind):
    pairs = report.pair_entities([sentence((4, 6, "ORG"))], [sentence((*predicted, "ORG"))])
    ((_, counts),) = report.boundaries(list(pairs), ["ORG"])["rows"]
    assert dict(zip(report.BOUNDARIES, counts, strict=True)) == dict.fromkeys(report.BOUNDARIES, 0) | {kind: 1}


def test_lengths_have_the_f1_of_their_sentences():
    short = sentence((0, 1, "LOC"), words=["Bari"])
    assert report.length_scores([(GOLD, PREDICTED), (short, short)]) == [
        ("1–3", 1, 1.0),
        ("7–12", 3, pytest.approx(1 / 3)),
    ]


@pytest.fixture(scope="module")
def html():
    words = ["<script>alert(1)</script>", "&", "Bari"]
    hostile = sentence((0, 1, "ORG"), words=words), sentence((2, 3, "LOC"), words=words, scores=[0.99])
    return report.make_report([GOLD, hostile[0]], [PREDICTED, hostile[1]], TRAINING, "it_test")


def test_the_report_asks_for_nothing_from_elsewhere_and_shows_text_as_text(html):
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(\s*["']?http|<script|<link|<iframe""", html
    )
    assert "&lt;script&gt;alert(1)" in html


def test_the_most_confident_error_comes_first_and_both_sides_are_shown(html):
    confident = html[html.index("Most confident errors") :]
    assert re.findall(r"<h3>([\d.]+) %", confident) == ["99.0", "80.0", "60.0"]
    assert confident.count("<span>gold</span>") == confident.count("<span>predicted</span>") == 3
    assert "<mark" in confident


def test_the_report_has_the_curves_and_figures_and_scores_types_strictly(html):
    assert html.count("<svg") == 3
    assert "2 test sentences with 4 entities" in html
    rows = [re.findall("<td>(.*?)</td>", row) for row in html.split("<tr>")]
    assert ["LOC", "1", "3", "0", "0.00", "0.00", "0.00"] in rows
    assert ["PER", "1", "1", "1", "100.00", "100.00", "100.00"] in rows
    assert ["all", "4", "4", "1", "25.00", "25.00", "25.00"] in rows


def test_a_missing_table_is_one_sentence(refused, tmp_path):
    output = refused(report, "it_test", tmp_path / "test.spacy", "--training", tmp_path / "training.jsonl")
    assert "training.jsonl: missing; run `spacy project run all`" in output
