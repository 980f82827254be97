import srsly

from conftest import ROOT
from scripts.panx import digest


def test_checksums_are_those_of_the_files(sample):
    sums = srsly.read_json(ROOT / "configs" / "checksums.json")["sample"]
    assert {split: entry["sha256"] for split, entry in sums.items()} == {s: digest(x) for s, x in sample.items()}
