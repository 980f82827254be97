"""Check what a run of the workflow needs before it begins, and print each problem in one sentence."""

import shutil
from pathlib import Path
from typing import Annotated

import numpy
import torch
import typer
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from wasabi import msg

from scripts.common import UserError
from scripts.download import check_encoder, explained, local_folder, reason
from scripts.package import check_names

ON_CPU = "or run on the CPU: `spacy project run all . --vars.gpu_id -1`"
GB = 10**9
# xlm-roberta-base: 1.1 GB each in the Hub's cache, the assets, two checkpoints, package, wheel, and temporary copies
NEED_ON_HUB = 9 * GB
NEED_PER_WEIGHTS = 7  # without the Hub's cache
PRODUCED = ("assets/data", "assets/extra_train", "assets/encoder", "corpus", "training", "metrics", "packages")


def check_pytorch(gpu_id: int) -> str:
    """Return the GPU's name. Raise UserError unless PyTorch computes on it."""
    try:
        torch.ones(2, device=f"cuda:{gpu_id}").tolist()
        name, (major, minor) = torch.cuda.get_device_name(gpu_id), torch.cuda.get_device_capability(gpu_id)
    except (AssertionError, RuntimeError) as error:  # no CUDA, no driver, an old driver, no such GPU, no code for it
        raise UserError(
            f"PyTorch {torch.__version__} does not compute on GPU {gpu_id} ({reason(error)}); run `make venv-gpu`, "
            f"install a driver until `nvidia-smi` runs, set another --vars.gpu_id, {ON_CPU}."
        ) from error
    return f"{name} (sm_{major}{minor}), PyTorch {torch.__version__} for CUDA {torch.version.cuda}"


def check_cupy(gpu_id: int) -> str:
    """Return CuPy's version. Raise UserError unless the parts of CuPy that thinc uses work."""
    try:
        import cupy
        import cupy.cublas  # without cuBLAS, thinc says that CuPy is not installed
        import cupyx

        with cupy.cuda.Device(gpu_id):
            numbers = cupy.random.uniform(0.0, 1.0, (64, 32))  # cuRAND
            table = cupy.zeros((2, 32))
            cupyx.scatter_add(table, cupy.asarray([0, 0]), numbers[:2])  # compiled by NVRTC
            product = cupy.dot(numbers, numbers.T).get()
        on_host = numbers.get()
        right = numpy.allclose(product, on_host @ on_host.T) and numpy.allclose(table.get()[0], on_host[:2].sum(axis=0))
    except Exception as error:  # ImportError, CUDARuntimeError, CompileException and others
        raise UserError(
            f"CuPy, which spaCy needs on a GPU, does not work ({reason(error)}); install cupy-cuda12x with "
            f"`make venv-gpu`, {ON_CPU}."
        ) from error
    if not right:
        raise UserError(f"CuPy {cupy.__version__} computes wrong products or sums; run `make gpu-check`, {ON_CPU}.")
    return f"CuPy {cupy.__version__} compiles, multiplies, adds and draws random numbers"


def check_gpu(gpu_id: int) -> None:
    """Raise UserError unless PyTorch and CuPy can compute on the GPU; -1 is the CPU."""
    if gpu_id >= 0:
        name = check_pytorch(gpu_id)
        check_cupy(gpu_id)
        msg.good(f"Runs on GPU {gpu_id}, {name}")
    else:
        faster = "; `--vars.gpu_id 0` is faster" if torch.cuda.is_available() else ""
        msg.good(f"Runs on the CPU{faster}")


def check_source(kind: str, name: str) -> None:
    """Raise UserError if the dataset or encoder (`kind`) is neither in a folder nor on the Hub."""
    if folder := local_folder(name, kind):
        if kind == "encoder":
            check_encoder(folder, name)
        msg.good(f"{kind.capitalize()} {name} is a folder")
        return
    with explained(kind, name):
        try:
            HfApi().repo_info(name, repo_type="dataset" if kind == "dataset" else "model", timeout=5)
        except RepositoryNotFoundError:
            raise
        except OSError as error:  # no connection, offline mode, HTTP 429 or 5xx
            msg.warn(
                f"The Hub did not answer ({type(error).__name__}): download needs {name} in the Hub's cache, or "
                f"--vars.{kind} FOLDER."
            )
        else:
            msg.good(f"{kind.capitalize()} {name} is on the Hub")


def check_disk(encoder: str) -> None:
    """Raise UserError unless the disk has room for a run. Files of an earlier run, which it replaces, count as free."""
    need = NEED_ON_HUB
    if (folder := Path(encoder).expanduser()).is_dir():
        need = NEED_PER_WEIGHTS * sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    produced = (file for name in PRODUCED for file in Path(name).rglob("*") if file.is_file())
    free = shutil.disk_usage(".").free
    if free + sum(file.stat().st_size for file in produced) < need:
        raise UserError(
            f"{free / GB:.1f} GB are free on this disk, and a run with {encoder} takes about {need / GB:.1f} GB; free "
            "some space, move the project, or set a smaller --vars.encoder."
        )
    msg.good(f"{free / GB:.1f} GB are free, about {need / GB:.1f} GB needed")


def main(
    gpu_id: Annotated[int, typer.Option(min=-1, help="Number of the GPU, -1 for the CPU")],
    dataset: Annotated[str, typer.Option(help="The dataset for download")],
    encoder: Annotated[str, typer.Option(help="The encoder for download")],
    lang: Annotated[str, typer.Option(help="First part of the package's name")],
    name: Annotated[str, typer.Option(help="Second part of the package's name")],
    version: Annotated[str, typer.Option(help="The package's version")],
) -> None:
    """Check what a run of the whole workflow needs: a GPU with CuPy, data, encoder, disk space, the package's name."""
    problems = 0
    sources = (check_source, "dataset", dataset), (check_source, "encoder", encoder)
    for check, *arguments in ((check_gpu, gpu_id), *sources, (check_disk, encoder), (check_names, lang, name, version)):
        try:
            check(*arguments)
        except UserError as error:
            msg.fail(str(error))
            problems += 1
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
