import numpy
import pytest
import spacy
from spacy.tokens import Doc

from lookup_ner import example, pipeline, trained
from scripts.calibrate import find_temperature
from scripts.common import UserError
from scripts.evaluate import calibration_bins, expected_calibration_error
from scripts.pipeline.token_ner import SCORED

WORDS = ["Anna", "Neri", "vive", "a", "Bari"]
RIGHT = ["B-PER", "I-PER", "O", "O", "B-LOC"]
WRONG = ["B-LOC", "I-LOC", "O", "O", "B-PER"]


@pytest.fixture
def nlp():
    return pipeline()


@pytest.fixture
def gold(nlp):
    """Sentences of which the trained pipeline finds both entities with certainty, where one in four is wrong."""
    trained(nlp)
    return [example(nlp, WORDS, RIGHT if i % 4 else WRONG) for i in range(40)]


def test_too_certain_a_pipeline_becomes_as_certain_as_it_is_right_and_finds_the_same_entities(nlp, gold, tmp_path):
    doc = nlp(Doc(nlp.vocab, words=WORDS))
    temperature, before, after = find_temperature(nlp, [gold])
    assert temperature > 1.5
    assert after < before / 2
    calibrated = nlp(Doc(nlp.vocab, words=WORDS))
    assert numpy.mean([ent._.panx_score for ent in calibrated.ents]) == pytest.approx(0.75, abs=0.1)
    assert [(e.text, e.label_) for e in calibrated.ents] == [(e.text, e.label_) for e in doc.ents]
    nlp.to_disk(tmp_path)
    assert spacy.load(tmp_path).get_pipe("ner").cfg["temperature"] == temperature


def test_the_threshold_neither_changes_the_temperature_nor_is_changed(nlp, gold):
    temperature, _, after = find_temperature(nlp, [gold])
    nlp.get_pipe("ner").threshold = 0.9
    assert find_temperature(nlp, [gold])[::2] == (temperature, after)
    assert nlp.get_pipe("ner").threshold == 0.9


def test_a_part_with_more_texts_does_not_count_more(nlp, gold):
    right = [example(nlp, WORDS, RIGHT) for _ in range(80)]
    few, many, alone = (find_temperature(nlp, parts)[0] for parts in ([gold, right[:4]], [gold, right], [gold]))
    assert few == pytest.approx(many, abs=0.01)
    assert few < alone - 0.1


def test_a_part_without_entities_does_not_count_and_alone_it_is_refused(nlp, gold):
    nothing = [example(nlp, ["vive", "a"], ["O", "O"])]
    assert find_temperature(nlp, [gold, nothing]) == pytest.approx(find_temperature(nlp, [gold]))
    with pytest.raises(UserError, match="finds no entity"):
        find_temperature(nlp, [nothing])


def scored(nlp, probability, count, right):
    """Gold and predicted Docs of one entity each, of which `right` are right."""
    found = [Doc(nlp.vocab, words=["Bari"], ents=["B-LOC"]) for _ in range(count)]
    for doc in found:
        doc.ents[0]._.set(SCORED, ("LOC", probability))
    return [Doc(nlp.vocab, words=["Bari"], ents=["B-LOC" if i < right else "B-PER"]) for i in range(count)], found


def test_the_calibration_error_is_the_mean_distance_from_the_line(nlp):
    sure, unsure = scored(nlp, 0.95, 10, 8), scored(nlp, 0.35, 30, 6)
    bins = calibration_bins(sure[0] + unsure[0], sure[1] + unsure[1])
    assert bins == [(30, pytest.approx(0.35), 0.2), (10, pytest.approx(0.95), 0.8)]
    assert expected_calibration_error(bins) == pytest.approx(0.15)
    assert calibration_bins(*scored(nlp, 1.0, 2, 2)) == [(2, 1.0, 1.0)]
    assert expected_calibration_error([]) == 0
