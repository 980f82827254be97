import re

import pytest
import srsly
from spacy.util import load_config

from conftest import ROOT
from scripts import package as prepare_package_script
from scripts.common import UserError
from scripts.package import inference_config, make_meta

TEMPLATE = srsly.read_json(ROOT / "configs" / "meta.json")
FIGURES = {"ents_p": 0.8, "ents_r": 0.7, "ents_f": 0.75}
TEST = FIGURES | {"ents_per_type": {"PER": {"p": 0.8, "r": 0.7, "f": 0.75}}}
PROVENANCE = {
    "data": {"source": "google/xtreme", "config": "PAN-X.it", "commit": "ab12"},
    "extra_train": [],
    "encoder": {"source": "my-encoder", "commit": None},
}


def test_sources_name_what_the_pipeline_was_made_from():
    data, encoder = make_meta(TEMPLATE, PROVENANCE, TEST, raw_text=FIGURES)["sources"]
    assert data == TEMPLATE["sources"]["google/xtreme"] | {"config": "PAN-X.it", "commit": "ab12"}
    assert encoder == {"name": "my-encoder", "license": "unknown"}


@pytest.mark.parametrize("test", [TEST | {"ents_f": 0.0}, TEST | {"ents_per_type": {}}, {}])
def test_a_pipeline_that_finds_nothing_is_not_packaged(test):
    with pytest.raises(UserError, match="finds no entity"):
        make_meta(TEMPLATE, PROVENANCE, test, raw_text=FIGURES)


def test_config_needs_nothing_of_the_project_and_predicts_in_full_precision():
    trained = load_config(ROOT / "configs" / "xlmr.cfg", interpolate=False)
    trained["components"]["transformer"]["model"]["mixed_precision"] = True  # as on a GPU
    config = inference_config(trained, "org/encoder")
    transformer = config["components"]["transformer"]["model"]
    assert (transformer["name"], transformer["mixed_precision"]) == ("org/encoder", False)
    assert not re.search("corpus/|assets/|TrainingLogger", config.to_str())


def test_figures_of_other_weights_are_not_packaged(refused, project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    options = ["--lang", "it", "--name", "panx_xlmr", "--version", "1.0.0"]
    output = refused(prepare_package_script, "training/model-last", tmp_path / "package", "true", *options)
    assert "other weights" in output
    assert "spacy project run evaluate" in output
    assert not (tmp_path / "package").exists()
