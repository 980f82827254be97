"""The whole workflow in a copy of the project, from TSV files to a wheel."""

import re
import shlex
import shutil
import zipfile

import pytest
import spacy
import srsly
from spacy.schemas import ModelMetaSchema, validate
from spacy.tokens import DocBin
from spacy.util import load_config
from weasel.cli.run import load_project_config, parse_config_overrides

from benchmarks.accuracy import copy_project
from conftest import ROOT
from workflow import project_run


def test_every_output_of_every_step_is_there(project):
    config = load_project_config(project)
    commands = [command for command in config["commands"] if command["name"] in config["workflows"]["all"]]
    outputs = [o for c in commands for o in c.get("outputs", [])]
    assert [o for o in outputs if not (project / o).exists()] == []


def test_every_script_and_config_is_a_dep_of_the_command_that_uses_it():
    for command in srsly.read_yaml(ROOT / "project.yml")["commands"]:
        words = re.sub(r"-m scripts\.(\w+)", r"scripts/\1.py", " ".join(command["script"])).replace(",", " ").split()
        used = [w for w in words if w.startswith(("scripts/", "configs/"))]
        if not command.get("no_skip"):
            code = "".join((ROOT / w).read_text() for w in used if re.fullmatch(r"scripts/\w+\.py", w))
            modules = {*re.findall(r"^(?:from|import) scripts\.(\w+)", code, re.M)} - {"common", "pipeline"}
            used += [f"scripts/{module}.py" for module in modules]
        deps = command.get("deps", [])
        assert [w for w in used if not any(w == dep or w.startswith(f"{dep}/") for dep in deps)] == []


def test_values_reach_the_commands_as_they_were_given():
    given = ["--vars.hub_repo", "me/x", "--vars.allow_other_data", "true", "--vars.dataset", "my data/it"]
    config = load_project_config(ROOT, overrides=parse_config_overrides(given))
    words = {command["name"]: shlex.split(command["script"][0]) for command in config["commands"]}
    assert "me/x" in words["push"]
    assert words["download"][words["download"].index("--allow-other-data") + 1].lower() == "true"
    for command in ("check", "download"):
        assert words[command][words[command].index("--dataset") + 1] == "my data/it"


def test_metrics_of_spacy_and_seqeval_are_the_same(project):
    spacys, seqevals = (srsly.read_json(project / "metrics" / f"{name}.json") for name in ("test", "seqeval"))
    assert spacys["ents_f"] > 0.5
    for key in ("ents_p", "ents_r", "ents_f"):
        assert seqevals[key] == pytest.approx(spacys[key], abs=1e-9)


def test_another_language_makes_another_package(project, variables, tmp_path):
    copy_project(tmp_path, project, ("corpus", "data"))
    spanish = variables | {"lang": "es", "dataset_config": "PAN-X.es", "extra_train": ""}
    for command in ("download", "convert-full", "configure"):
        project_run(tmp_path, command, spanish)
    assert load_config(tmp_path / "training" / "config.cfg")["nlp"]["lang"] == "es"
    docs = list(DocBin().from_disk(tmp_path / "corpus" / "train.spacy").get_docs(spacy.blank("es").vocab))
    assert [doc.text for doc in docs] == ["Sevilla", "hola"]
    config = load_project_config(tmp_path, overrides={"vars.lang": "es"})
    outputs = [output for command in config["commands"] for output in command.get("outputs", [])]
    assert "packages/es_panx_xlmr-2.0.0/dist/es_panx_xlmr-2.0.0-py3-none-any.whl" in outputs


def test_full_trains_on_all_sentences_and_on_the_running_corpus(project, variables, tmp_path):
    copy_project(tmp_path, project, ("corpus", "data"))
    project_run(tmp_path, "full", variables | {"epochs": 3, "train_size": 5})
    *_, last = srsly.read_jsonl(tmp_path / "metrics" / "training.jsonl")
    # 41 sentences, 2 Spanish ones and twice 16 of the running corpus, in batches of 6
    assert (last["epoch"], last["step"]) == (3, 3 * 13)
    card = (tmp_path / "packages" / "it_panx_xlmr-2.0.0" / "README.md").read_text(encoding="utf8")
    assert "| epochs | 3 |" in card
    assert "running corpus of the it_panx_xlmr project" in card


def test_running_again_skips_what_is_done(project, variables, capfd):
    project_run(project, "all", variables)
    output = capfd.readouterr().out
    for name in ("convert", "configure", "train", "slim", "evaluate", "report", "package"):
        assert f"Skipping '{name}'" in output


def test_meta_is_what_spacy_accepts_and_has_the_sources_and_the_figures_of_the_test_sentences(project):
    meta = srsly.read_json(project / "packages" / "it_panx_xlmr-2.0.0" / "meta.json")
    test = srsly.read_json(project / "metrics" / "test.json")
    raw_text = srsly.read_json(project / "metrics" / "raw_text.json")
    assert validate(ModelMetaSchema, meta) == []
    assert [source.get("config") for source in meta["sources"]] == ["tiny", "PAN-X.es", None]
    assert meta["performance"]["ents_f"] == test["ents_f"]
    assert meta["performance"]["raw_text_ents_f"] == raw_text["ents_f"]
    assert set(meta["performance"]["ents_per_type"]) == {"LOC", "ORG", "PER"}
    assert meta["labels"]["ner"] == ["LOC", "ORG", "PER"]
    assert {"spacy-transformers", "spacy"} <= {r.split(">")[0] for r in meta["requirements"]}


def test_the_wheel_holds_a_model_card_and_the_licences(project):
    (wheel,) = (project / "packages").rglob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = {n: archive.read(f"it_panx_xlmr/it_panx_xlmr-2.0.0/{n}").decode() for n in ("README.md", "LICENSE")}
        sources = archive.read("it_panx_xlmr/it_panx_xlmr-2.0.0/LICENSES_SOURCES").decode()
    assert text["LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf8")
    assert "PAN-X.es" in text["README.md"]
    assert "| epochs | 10 |" in text["README.md"]
    assert f"{srsly.read_json(project / 'metrics' / 'test.json')['ents_f'] * 100:.2f}" in text["README.md"]
    assert sources.count("Licence:") == 3


def test_a_wheel_built_again_holds_the_weights_that_were_evaluated(project, variables, tmp_path):
    copy = shutil.copytree(project, tmp_path / "project")
    for command in ("slim", "evaluate", "package"):
        project_run(copy, command, variables | {"slim": False})
    (wheel,) = (copy / "packages").rglob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read("it_panx_xlmr/it_panx_xlmr-2.0.0/transformer/model")
    assert packed == (copy / "training" / "model" / "transformer" / "model").read_bytes()
    assert packed == (copy / "training" / "model-last" / "transformer" / "model").read_bytes()
    assert (project / "training" / "model" / "transformer" / "model").stat().st_size < 0.8 * len(packed)  # slim


def test_clean_removes_what_was_made_and_nothing_else(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "project", ignore=shutil.ignore_patterns("model-*", "*.whl"))
    for name in ("corpus/sample", "build"):
        (copy / name).mkdir()
    project_run(copy, "clean")
    made = ("assets", "training", "metrics", "packages", "build")
    assert [path for name in made for path in (copy / name).rglob("*")] == []
    assert {path.name for path in (copy / "corpus").iterdir()} == {"sample", "running"}
    assert (copy / "scripts" / "train.py").exists()
