"""What neither a downloaded file nor a value on the command line may do."""

import pickle
import sys
from pathlib import Path

import pytest
import spacy
import srsly
from spacy_transformers.data_classes import HFObjects

from conftest import ROOT
from scripts import package as prepare_package
from scripts.pipeline import encoder
from test_encoder import pipeline, shim

WATCHED = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
WATCHED |= {"socket.connect", "socket.getaddrinfo"}
seen: list[str] | None = None  # what of WATCHED happens while a test sets it to a list


def _watch(event, arguments):
    if seen is not None and event in WATCHED:
        seen.append(f"{event} {arguments}")


sys.addaudithook(_watch)  # stays for good


def test_loading_and_running_a_pipeline_unpickles_starts_and_connects_to_nothing(project, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", False)
    monkeypatch.setattr(sys.modules[__name__], "seen", [])
    nlp = spacy.load(project / "training" / "model-package")
    assert [ent.text for ent in nlp("Bari").ents] == ["Bari"]
    assert seen == []
    pickle.loads(pickle.dumps(Path("a")))  # the test would see it
    assert seen


def read(stored):
    return encoder.TransformerShim(HFObjects(None, None, None, {}, {}), precision="float32").from_bytes(
        srsly.msgpack_dumps(stored)
    )


EVIL = "import pathlib\npathlib.Path({path!r}).write_text('was here')\nclass Evil: pass\n"


@pytest.fixture
def stored(tiny_encoder):
    """What a pipeline stores of a transformer."""
    return srsly.msgpack_loads(shim(pipeline(tiny_encoder)).to_bytes())


@pytest.mark.parametrize("name", ["../outside.txt", "/nowhere/outside.txt", "a/b.txt", ".."])
def test_a_pipelines_files_cannot_leave_their_folder(stored, name):
    stored["tokenizer"][name] = b"outside"
    with pytest.raises(ValueError, match="plain names"):
        read(stored)


def test_a_pipeline_cannot_have_another_file_read_as_its_vocabulary(stored, tmp_path):
    (tmp_path / "secret").write_text("secret")
    settings = srsly.json_loads(stored["tokenizer"]["tokenizer_config.json"].decode())
    settings["vocab_file"] = str(tmp_path / "secret")
    stored["tokenizer"]["tokenizer_config.json"] = srsly.json_dumps(settings).encode()
    with pytest.raises(ValueError, match="names a file"):
        read(stored)


@pytest.mark.parametrize("part", ["tokenizer", "config"])
def test_code_that_a_pipeline_brings_along_is_not_run(stored, tmp_path, part):
    marker = tmp_path / "marker"
    stored["tokenizer"]["evil.py"] = EVIL.format(path=str(marker)).encode()
    stored["tokenizer"]["kwargs"] |= {"trust_remote_code": True}
    if part == "config":
        stored["config"] |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}, "model_type": "evil"}
    else:
        settings = srsly.json_loads(stored["tokenizer"]["tokenizer_config.json"].decode())
        settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "EvilTokenizer"}
        stored["tokenizer"]["tokenizer_config.json"] = srsly.json_dumps(settings).encode()
    with pytest.raises(ValueError):
        read(stored)
    assert not marker.exists()


# ---- Values of project.yml's vars

TRICKS = ["x; touch pwned", "$(touch pwned)", "`touch pwned`", "../../precious", "/precious", "..", "X"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("lang", "../it"), ("lang", ""), ("version", "2.1"), ("version", "1/../.."), *(("name", t) for t in TRICKS)],
)
def test_a_name_that_could_mean_another_folder_is_refused_in_a_sentence(refused, tmp_path, key, value):
    values = {"lang": "it", "name": "panx_xlmr", "version": "1.0.0"} | {key: value}
    options = [f"--{name}={text}" for name, text in values.items()]
    output = refused(prepare_package, tmp_path / "model", tmp_path / "output", "false", *options)
    assert f"set --vars.{key}" in output
    assert not (tmp_path / "output").exists()


def test_a_folder_named_by_a_value_is_removed_only_after_the_name_was_checked():
    commands = {command["name"]: command["script"] for command in srsly.read_yaml(ROOT / "project.yml")["commands"]}
    removing = [
        name for name, lines in commands.items() if any(line.startswith("rm ") and "$" in line for line in lines)
    ]
    assert removing == ["package"]
    assert commands["package"][0].startswith("python -m scripts.package ")
