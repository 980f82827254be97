import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import typer

from fake_hub import Hub, connect, write_encoder
from gpu_stand_in import cupy_on_numpy
from scripts import check
from scripts.common import UserError

CPU = "spacy project run all . --vars.gpu_id -1"


@pytest.fixture
def machine(monkeypatch):
    """Makes PyTorch and CuPy look as on such a machine.

    gpu: the error with which PyTorch refuses to compute on it. cupy: None if missing, the error of its kernels, or what
    they return.
    """

    def call(gpu=None, cupy=True):
        functions = {
            "is_available": lambda: gpu is None,
            "get_device_name": lambda number: f"Card {number}",
            "get_device_capability": lambda number: (9, 0),
        }
        version, cuda = SimpleNamespace(cuda="12.8"), SimpleNamespace(**functions)
        torch = SimpleNamespace(ones=Mock(side_effect=gpu), version=version, cuda=cuda, __version__="2.0")
        monkeypatch.setattr(check, "torch", torch)
        fakes = cupy_on_numpy.modules()
        monkeypatch.setattr(fakes["cupy"].cuda, "Device", nullcontext)
        if isinstance(cupy, Exception):
            monkeypatch.setattr(fakes["cupy"], "dot", Mock(side_effect=cupy), raising=False)
        elif cupy == "wrong":
            monkeypatch.setattr(fakes["cupy"], "dot", lambda left, right: left @ right * 0, raising=False)
        for name, fake in fakes.items():
            monkeypatch.setitem(sys.modules, name, fake if cupy else None)  # None makes the import fail

    return call


NO_CUDA = AssertionError("Torch not compiled with CUDA enabled")
NO_CODE = RuntimeError("CUDA error: no kernel image is available\nFor debugging consider")


@pytest.mark.parametrize(
    ("surroundings", "sentence"),
    [
        ({"gpu": NO_CUDA}, "PyTorch 2.0 does not compute on GPU 0 (Torch not compiled with CUDA enabled); run `make"),
        ({"gpu": NO_CODE}, "(CUDA error: no kernel image is available For debugging consider); run `make venv-gpu`"),
        ({"cupy": None}, "CuPy, which spaCy needs on a GPU, does not work (import of cupy halted"),
        ({"cupy": RuntimeError("no nvrtc")}, "(no nvrtc); install cupy-cuda12x with `make venv-gpu`"),
        ({"cupy": "wrong"}, "CuPy 14.2.0 computes wrong products or sums"),
    ],
)
def test_what_a_gpu_run_lacks_is_one_sentence_with_the_way_to_the_cpu(machine, surroundings, sentence):
    machine(**surroundings)
    with pytest.raises(UserError) as error:
        check.check_gpu(0)
    assert sentence in str(error.value)
    assert CPU in str(error.value)


def test_the_installed_pytorch_refuses_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="does not compute on GPU 99"):
        check.check_gpu(99)


def test_a_gpu_that_works_is_named(machine, capsys):
    machine()
    check.check_gpu(1)
    assert "Runs on GPU 1, Card 1" in capsys.readouterr().out


def test_the_cpu_needs_neither_gpu_nor_cupy_but_an_idle_gpu_is_mentioned(machine, capsys):
    machine(gpu=NO_CUDA, cupy=None)
    check.check_gpu(-1)
    machine(cupy=None)
    check.check_gpu(-1)
    output = capsys.readouterr().out
    assert output.count("Runs on the CPU") == 2
    assert output.count("`--vars.gpu_id 0` is faster") == 1


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    hub.publish("datasets", "acme/names", {})
    hub.publish("models", "acme/tiny", {})
    connect(monkeypatch, hub)
    yield hub
    huggingface_hub.configure_http_backend()


@pytest.mark.parametrize(("kind", "name"), [("dataset", "acme/names"), ("encoder", "acme/tiny")])
def test_a_source_on_the_hub_is_good_and_a_hub_without_an_answer_a_warning(hub, monkeypatch, capsys, kind, name):
    check.check_source(kind, name)
    assert f"✔ {kind.capitalize()} {name} is on the Hub" in capsys.readouterr().out
    for hub.status in (0, 429, 503, None):
        if hub.status is None:
            connect(monkeypatch)
        check.check_source(kind, name)
        output = " ".join(capsys.readouterr().out.split())
        assert "⚠ The Hub did not answer" in output
        assert f"download needs {name} in the Hub's cache, or --vars.{kind} FOLDER" in output


@pytest.fixture
def free(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(size)))


@pytest.mark.parametrize("encoder", ["acme/tiny", "tiny"])
def test_the_disk_needs_room_for_a_run_and_what_an_earlier_run_left_counts(free, tmp_path, encoder):
    weights = (write_encoder(tmp_path / "tiny") / "model.safetensors").stat().st_size
    need = 7 * weights if encoder == "tiny" else 9 * 10**9
    free(need)
    check.check_disk(encoder)
    free(need - 1)
    write_encoder(tmp_path / "assets" / "encoder-small")  # no run replaces it
    with pytest.raises(UserError, match="GB are free on this disk"):
        check.check_disk(encoder)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "model").write_bytes(b"x")
    check.check_disk(encoder)


def test_all_problems_are_printed_at_once_and_stop_the_run_and_folders_are_good(machine, hub, free, tmp_path, capsys):
    package = {"name": "panx_xlmr", "version": "2.0.0"}
    encoder = write_encoder(tmp_path / "tiny")
    (encoder / "tokenizer.json").unlink()
    machine(gpu=NO_CUDA)
    free(0)
    with pytest.raises(typer.Exit) as error:
        check.main(gpu_id=0, dataset="acme/nothing", encoder=str(encoder), lang="jp", **package)
    assert error.value.exit_code == 1
    output = " ".join(capsys.readouterr().out.split())
    assert [output.count(sign) for sign in ("✘", "✔", "could not be loaded")] == [5, 0, 2]
    free(10**10)
    check.main(gpu_id=-1, dataset=str(tmp_path), encoder=str(write_encoder(encoder)), lang="it", **package)
    assert capsys.readouterr().out.count("✔") == 4
