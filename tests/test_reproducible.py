"""The same seed on the same machine makes the same products, in whatever folder."""

import os

import pytest

from conftest import build_project
from workflow import contents


@pytest.mark.skipif("REPRODUCIBLE" not in os.environ, reason="trains twice: `make test-reproducible` runs it")
def test_two_folders_give_the_same_products(tmp_path, sample, variables):
    one, two = (contents(build_project(tmp_path / name, sample, variables)) for name in ("one", "another/folder"))
    assert one
    assert one == two
