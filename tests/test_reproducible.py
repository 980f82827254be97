"""The same seed on the same machine makes the same wheel, in whatever folder."""

import hashlib
import os
import zipfile

import pytest
import srsly

from conftest import build_project

pytestmark = pytest.mark.skipif(
    "REPRODUCIBLE" not in os.environ, reason="trains twice: `make test-reproducible` runs it"
)


def members(root):
    """SHA-256 of each file in the wheel, in the archive's order; the archive's own times are left out."""
    (wheel,) = (root / "packages").rglob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_two_folders_give_the_same_wheel_contents(tmp_path, sample, tiny_encoder):
    one, two = (build_project(tmp_path / name, sample, tiny_encoder) for name in ("one", "another/folder"))
    first, second = members(one), members(two)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    figures = [srsly.read_json(folder / "metrics" / "test.json") for folder in (one, two)]
    for row in figures:
        del row["speed"]
    assert figures[0] == figures[1]
    for name in ("metrics/raw_text.json", "metrics/training.jsonl", "corpus/stats.json", "corpus/train.spacy"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
