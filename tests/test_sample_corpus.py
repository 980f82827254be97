from collections import Counter

import spacy
import srsly

from conftest import ROOT
from scripts.convert import make_doc
from scripts.panx import ENTITY_LABELS, digest, read_tsv


def names(sentences):
    vocab = spacy.blank("it").vocab
    return Counter((ent.label_, ent.text) for s in sentences for ent in make_doc(vocab, s).ents)


def test_is_as_large_as_the_readme_says(sample):
    assert {split: len(sentences) for split, sentences in sample.items()} == {
        "train": 683,
        "validation": 141,
        "test": 141,
    }


def test_no_sentence_is_there_twice(sample):
    words = [s.words for sentences in sample.values() for s in sentences]
    assert len(words) == len(set(words))


def test_every_split_has_every_label_in_similar_number(sample):
    for sentences in sample.values():
        counts = Counter(label for label, _ in names(sentences).elements())
        assert set(counts) == set(ENTITY_LABELS)
        assert max(counts.values()) < 1.5 * min(counts.values())


def test_most_names_of_the_test_are_not_seen_in_training(sample):
    test, train = names(sample["test"]), names(sample["train"])
    assert len(set(test) - set(train)) > 0.8 * len(test)


def test_checksums_are_those_of_the_files(sample):
    sums = srsly.read_json(ROOT / "configs" / "checksums.json")["sample"]
    assert {split: entry["sha256"] for split, entry in sums.items()} == {s: digest(x) for s, x in sample.items()}


def test_no_sentence_is_copied_from_panx(sample, panx_dir):
    real = {s.words for split in sample for s in read_tsv(panx_dir / f"{split}-it.tsv")}
    assert not [" ".join(s.words) for sentences in sample.values() for s in sentences if s.words in real]
