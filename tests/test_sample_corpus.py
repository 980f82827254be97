import srsly

from conftest import ROOT
from scripts.panx import digest, read_tsv


def test_checksums_are_those_of_the_files(sample):
    sums = srsly.read_json(ROOT / "configs" / "checksums.json")["sample"]
    assert {split: entry["sha256"] for split, entry in sums.items()} == {s: digest(x) for s, x in sample.items()}


def test_no_sentence_is_copied_from_panx(sample, panx_dir):
    real = {s.words for split in sample for s in read_tsv(panx_dir / f"{split}-it.tsv")}
    assert not [" ".join(s.words) for sentences in sample.values() for s in sentences if s.words in real]
