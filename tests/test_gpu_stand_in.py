"""The GPU path on a stand-in for a GPU; tests/gpu_stand_in/__init__.py says what that cannot show."""

import os
import re
import subprocess
import sys

import pytest
import srsly
import torch

from conftest import ROOT

# of the second update of 24 sentences in mixed precision; it had 448, 163, 5 and 2
LIMITS = {"kernels": 500, "kernels of the CRF": 200, "copies to the device": 8, "our syncs": 5}

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the stand-in knows the private functions of PyTorch 2.13"
)


@pytest.fixture(scope="module")
def results(tiny_encoder, tmp_path_factory):
    """Return what tests/gpu_stand_in/__main__.py saw. It runs in a new process because it changes PyTorch."""
    folder = tmp_path_factory.mktemp("stand-in")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "gpu_stand_in", str(tiny_encoder), str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return srsly.read_json(folder / "results.json")


def test_the_stand_in_refuses_what_a_gpu_refuses(results):
    assert results["computed though a GPU refuses it"] == []


def test_calibration_and_evaluation_on_a_gpu_are_those_of_the_cpu(results):
    cuda, cpu = results["cuda"], results["cpu"]
    assert cpu["raw text"]["ents_f"] > 0.9
    # the last digits depend on the order of sums
    error = "ents_calibration_error"
    assert cuda["temperature"] == pytest.approx(cpu["temperature"], abs=0.01)
    assert cuda["raw text"] == cpu["raw text"] | {error: pytest.approx(cpu["raw text"][error], abs=1e-5)}


def test_spacy_train_runs_on_a_gpu_in_mixed_precision(results):
    (row,) = results["training"]
    assert row["step"] == 2
    assert 0 < row["validation_loss"] < row["training_loss"]


def test_prediction_is_never_in_half_precision(results):
    assert results["predictions"] > 5
    assert results["autocast in prediction"] == 0


def test_float32_is_the_cpus_and_mixed_precision_close(results):
    assert [check["ok"] for check in results["gpu_check"]] == [True] * 8
    differences = [re.search(r"differ by at most (\S+)", check["result"]) for check in results["gpu_check"]]
    float32, mixed = (float(match[1]) for match in differences if match)
    assert float32 < 1e-6 and float32 < mixed < 1e-2


def test_gradients_of_two_batches_add_up_in_mixed_precision(results):
    assert results["accumulation error"] < 0.01


@pytest.mark.parametrize("what", LIMITS)
def test_a_step_asks_little_of_a_gpu(results, what):
    assert results["step"][what] <= LIMITS[what]
