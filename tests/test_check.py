import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import srsly
from safetensors.numpy import save_file

from scripts import check as module
from scripts.check import GB, Findings, check_disk, check_gpu, check_sources, mend_lock
from scripts.common import UserError
from scripts.download import HubUnreachable

ROOT = Path(__file__).parents[1]
CPU = "spacy project run all . --vars.gpu_id -1"


@pytest.fixture
def machine(monkeypatch):
    """Makes PyTorch and CuPy look as on such a machine; `cupy`: None is not installed, an exception is raised."""

    def call(gpus=0, cuda="12.8", cupy=None):
        cuda_functions = SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            get_device_name=lambda number: f"Card {number}",
        )
        torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=cuda_functions, __version__="2.0")
        monkeypatch.setitem(sys.modules, "torch", torch)

        class Array:
            def sum(self):
                return self

            def item(self):
                if isinstance(cupy, Exception):
                    raise cupy
                return 1

        class Device:
            def __init__(self, number):
                assert number < gpus

            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

        fake = SimpleNamespace(cuda=SimpleNamespace(Device=Device), arange=lambda size: Array())
        monkeypatch.setitem(sys.modules, "cupy", fake if cupy else None)  # None makes the import fail

    return call


def gpu(gpu_id):
    findings = Findings()
    check_gpu(gpu_id, findings)
    return findings


@pytest.mark.parametrize("gpu_id", ["", "zero", "-2", "0.5", "0,1"])
def test_gpu_id_that_is_no_number_of_a_gpu(machine, gpu_id):
    machine(gpus=2, cupy=True)
    assert [f"gpu_id is {gpu_id!r}; expected -1" in problem for problem in gpu(gpu_id).problems] == [True]


@pytest.mark.parametrize(
    ("surroundings", "gpu_id", "sentence"),
    [
        ({"cuda": None, "cupy": True}, "0", "PyTorch 2.0 is built without CUDA"),
        ({"cupy": True}, "0", "PyTorch finds no CUDA device"),
        ({"gpus": 1, "cupy": True}, "1", "There is no GPU 1, only 0;"),
        ({"gpus": 2, "cupy": True}, "2", "There is no GPU 2, only 0, 1;"),
        (
            {"gpus": 1},
            "0",
            "CuPy, which spaCy needs on a GPU, can't be imported; `pip install -r requirements-gpu.txt`",
        ),
        ({"gpus": 1, "cupy": RuntimeError("no nvrtc\nlong")}, "0", "CuPy can't compute on GPU 0 (no nvrtc);"),
    ],
)
def test_what_a_gpu_run_lacks_is_said_with_the_way_to_the_cpu(machine, surroundings, gpu_id, sentence):
    machine(**surroundings)
    problems = gpu(gpu_id).problems
    assert [sentence in problem and CPU in problem for problem in problems] == [True]


def test_missing_device_and_missing_cupy_are_told_at_once(machine):
    machine()
    assert len(gpu("0").problems) == 2


def test_gpu_that_works_is_named(machine):
    machine(gpus=2, cupy=True)
    findings = gpu("1")
    assert findings.problems == []
    assert findings.good == ["Runs on GPU 1, Card 1"]


def test_cpu_needs_neither_gpu_nor_cupy_but_hears_of_an_idle_gpu(machine):
    machine()
    assert gpu("-1") == Findings(good=["Runs on the CPU"])
    machine(gpus=1)
    findings = gpu("-1")
    assert findings.problems == []
    assert "GPU 0 is there, Card 0: `--vars.gpu_id 0`" in findings.good[0]


def write_encoder(folder: Path, size=1):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": numpy.zeros(size, dtype="uint8")}, folder / "model.safetensors")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the question to the Hub: `answers` by name, an exception is raised; gives the names asked for."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    asked = []

    def call(**answers):
        def hub_commit(name, kind, timeout):
            assert timeout <= 10
            asked.append(name)
            if isinstance(answers.get(kind), Exception):
                raise answers[kind]

        monkeypatch.setattr(module, "hub_commit", hub_commit)
        return asked

    return call


def sources(tmp_path, dataset="acme/names", encoder="acme/tiny"):
    findings = Findings()
    check_sources({"dataset": dataset, "encoder": encoder}, tmp_path / "assets", findings)
    return findings


def test_repositories_on_the_hub_are_good(hub, tmp_path):
    asked = hub()
    assert sources(tmp_path).good == ["Dataset acme/names is on the Hub", "Encoder acme/tiny is on the Hub"]
    assert asked == ["acme/names", "acme/tiny"]


def test_hub_without_an_answer_is_asked_once_and_told_once(hub, tmp_path):
    asked = hub(dataset=HubUnreachable({"dataset": "acme/names"}, "Timeout"))
    findings = sources(tmp_path)
    assert len(findings.problems) == len(asked) == 1
    for part in (
        "dataset acme/names and encoder acme/tiny",
        "(Timeout)",
        "--vars.dataset FOLDER",
        "--vars.encoder FOLDER",
    ):
        assert part in findings.problems[0]


def test_hub_without_an_answer_only_warns_where_the_cache_has_all(hub, tmp_path):
    hub(encoder=HubUnreachable({"encoder": "acme/tiny"}, "Timeout"))
    assert len(sources(tmp_path).problems) == 1
    (tmp_path / "cache" / "models--acme--tiny" / "snapshots").mkdir(parents=True)
    findings = sources(tmp_path)
    assert findings.problems == []
    assert ["cache has a copy" in warning for warning in findings.warnings] == [True]


def test_unknown_repositories_are_all_told(hub, tmp_path):
    hub(dataset=UserError("no such dataset"), encoder=UserError("no such encoder"))
    assert sources(tmp_path).problems == ["no such dataset", "no such encoder"]


def test_what_is_on_this_machine_needs_no_hub(hub, tmp_path):
    asked = hub()
    (tmp_path / "data").mkdir()
    findings = sources(tmp_path, dataset=str(tmp_path / "data"), encoder=str(write_encoder(tmp_path / "tiny")))
    assert (len(findings.good), findings.problems, asked) == (2, [], [])


def test_hub_sources_in_the_assets_already_need_no_hub(hub, tmp_path, monkeypatch):
    asked = hub()

    def recorded(assets, part, request):
        assert assets == tmp_path / "assets"
        return {"data": "acme/names", "encoder": "acme/tiny"}[part] == request["source"] and request["kind"] == "hub"

    monkeypatch.setattr(module, "recorded", recorded)
    assert sources(tmp_path).problems == []
    assert asked == []
    sources(tmp_path, encoder="acme/other")
    assert asked == ["acme/other"]


def test_missing_and_broken_folders_are_all_told(hub, tmp_path):
    hub()
    folder = write_encoder(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").unlink()
    problems = sources(tmp_path, dataset="./missing", encoder=str(folder)).problems
    assert len(problems) == 3
    assert problems[0].startswith("./missing: there is no such folder")
    assert "no model.safetensors" in problems[1]
    assert "no tokenizer" in problems[2]


@pytest.fixture
def free(monkeypatch):
    usage = namedtuple("usage", "total used free")
    return lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, int(size)))


def disk(tmp_path, encoder="acme/tiny"):
    findings = Findings()
    check_disk(encoder, tmp_path / "project" / "assets", findings)
    return findings


def test_disk_needs_8_gb_for_an_encoder_of_unknown_size(free, tmp_path):
    free(8 * GB)
    assert disk(tmp_path).problems == []
    free(7.9 * GB)
    assert ["7.9 GB are free" in problem and "about 8.0 GB" in problem for problem in disk(tmp_path).problems] == [True]


def test_disk_needs_seven_times_the_weights_of_a_local_encoder(free, tmp_path):
    folder = write_encoder(tmp_path / "tiny", size=1000)
    weights = (folder / "model.safetensors").stat().st_size
    free(7 * weights)
    assert disk(tmp_path, str(folder)).problems == []
    free(7 * weights - 1)
    assert len(disk(tmp_path, str(folder)).problems) == 1


def test_what_an_earlier_run_left_counts_as_room(free, tmp_path):
    free(8 * GB - 100)
    assert disk(tmp_path).problems
    (tmp_path / "project" / "training" / "model-last").mkdir(parents=True)
    (tmp_path / "project" / "training" / "model-last" / "model").write_bytes(b"x" * 100)
    assert not disk(tmp_path).problems


NOTES = {"train": {"cmd": "spacy project run train", "outs": []}, "slim": {"cmd": "spacy project run slim"}}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", {}),
        ("train:\n  cmd: 'spacy pro", {}),
        ("train:\n  cmd: x\nslim:\n", {"train": {"cmd": "x"}}),
        ("- train\n", {}),
        ("\0\0", {}),
    ],
)
def test_a_lock_that_was_cut_off_is_mended_and_said_so(tmp_path, text, left):
    path = tmp_path / "project.lock"
    path.write_text(text)
    findings = Findings()
    mend_lock(path, findings)
    assert srsly.read_yaml(path) == left
    assert (findings.problems, len(findings.warnings)) == ([], 1)
    assert f"{path}: cut off" in findings.warnings[0]
    assert [file.name for file in tmp_path.iterdir()] == ["project.lock"]


def test_a_whole_lock_stays_as_it_is(tmp_path):
    path = tmp_path / "project.lock"
    srsly.write_yaml(path, NOTES)
    before = path.read_bytes()
    for _ in range(2):
        findings = Findings()
        mend_lock(path, findings)
        assert findings.warnings == []
        assert path.read_bytes() == before
    path.unlink()
    mend_lock(path, findings)
    assert not path.exists()


def run(tmp_path, *options):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*", "no_proxy": "*"}
    command = [sys.executable, "-m", "scripts.check", *options, "--assets", tmp_path / "assets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, " ".join(done.stdout.split())


def test_all_problems_are_printed_at_once_and_stop_the_run(tmp_path):
    code, text = run(tmp_path, "--gpu-id", "zero", "--dataset", "./missing", "--encoder", "acme/tiny")
    assert code == 1
    assert text.count("✘") == 3
    for part in ("gpu_id is 'zero'", "./missing: there is no such folder", "encoder acme/tiny could not be fetched"):
        assert part in text


def test_ready_machine_gets_ticks_only(tmp_path):
    (tmp_path / "data").mkdir()
    encoder = write_encoder(tmp_path / "tiny")
    code, text = run(tmp_path, "--gpu-id", "-1", "--dataset", tmp_path / "data", "--encoder", encoder)
    assert code == 0, text
    assert "Runs on the CPU" in text
    assert (text.count("✔"), text.count("✘")) == (4, 0)
