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
    """Makes PyTorch, CuPy and the driver look as on such a machine.

    card: the compute capability. cupy: None if missing, the error of its kernels, or what they return.
    """

    def call(gpus=0, cuda="12.8", driver=(12, 4), card=(9, 0), code=("sm_75", "sm_86", "sm_90"), cupy=True):
        functions = {
            "is_available": lambda: gpus > 0,
            "device_count": lambda: gpus,
            "get_device_name": lambda number: f"Card {number}",
            "get_device_capability": lambda number: card,
            "get_arch_list": lambda: list(code),
        }
        version = SimpleNamespace(cuda=cuda)
        torch = SimpleNamespace(version=version, cuda=SimpleNamespace(**functions), __version__="2.0")
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setattr(check, "driver_cuda", lambda: driver)
        fakes = cupy_on_numpy.modules()
        monkeypatch.setattr(fakes["cupy"].cuda, "Device", nullcontext)
        if isinstance(cupy, Exception):
            monkeypatch.setattr(fakes["cupy"], "dot", Mock(side_effect=cupy), raising=False)
        elif cupy == "wrong":
            monkeypatch.setattr(fakes["cupy"], "dot", lambda left, right: left @ right * 0, raising=False)
        for name, fake in fakes.items():
            monkeypatch.setitem(sys.modules, name, fake if cupy else None)  # None makes the import fail

    return call


@pytest.mark.parametrize(
    ("surroundings", "sentence"),
    [
        ({"cuda": None}, "PyTorch 2.0 is built without CUDA; run `make venv-gpu`"),
        ({"driver": None}, "No working NVIDIA driver (libcuda.so.1); install one"),
        ({"driver": (11, 4)}, "is built for CUDA 12.8 and the driver for 11.4; install a newer driver"),
        ({"gpus": 0}, "No GPU 0: PyTorch finds 0 GPUs; check `nvidia-smi`"),
        ({"gpus": 1, "card": (7, 0)}, "no code for Card 0 (sm_70), only for sm_75, sm_86, sm_90; use another GPU"),
        ({"gpus": 1, "card": (12, 0)}, "no code for Card 0 (sm_120)"),
        ({"gpus": 1, "cupy": None}, "CuPy, which spaCy needs on a GPU, does not work (import of cupy halted"),
        ({"gpus": 1, "cupy": RuntimeError("no nvrtc")}, "(no nvrtc); install cupy-cuda12x with `make venv-gpu`"),
        ({"gpus": 1, "cupy": "wrong"}, "CuPy 14.2.0 computes wrong products or sums"),
    ],
)
def test_what_a_gpu_run_lacks_is_one_sentence_with_the_way_to_the_cpu(machine, surroundings, sentence):
    machine(**surroundings)
    with pytest.raises(UserError) as error:
        check.check_gpu(0)
    assert sentence in str(error.value)
    assert CPU in str(error.value)


@pytest.mark.parametrize(
    "surroundings", [{}, {"card": (8, 9)}, {"card": (12, 0), "code": ("sm_90", "compute_90")}, {"driver": (13, 0)}]
)
def test_a_gpu_that_works_is_named(machine, capsys, surroundings):
    machine(gpus=2, **surroundings)
    check.check_gpu(1)
    assert "Runs on GPU 1, Card 1" in capsys.readouterr().out


def test_the_cpu_needs_neither_gpu_nor_cupy_but_an_idle_gpu_is_mentioned(machine, capsys):
    machine(cuda=None, cupy=None)
    check.check_gpu(-1)
    machine(gpus=1, cupy=None)
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
    machine()
    free(0)
    with pytest.raises(typer.Exit) as error:
        check.main(gpu_id=0, dataset="acme/nothing", encoder=str(encoder), lang="jp", **package)
    assert error.value.exit_code == 1
    output = " ".join(capsys.readouterr().out.split())
    assert [output.count(sign) for sign in ("✘", "✔", "could not be loaded")] == [5, 0, 2]
    free(10**10)
    check.main(gpu_id=-1, dataset=str(tmp_path), encoder=str(write_encoder(encoder)), lang="it", **package)
    assert capsys.readouterr().out.count("✔") == 4
