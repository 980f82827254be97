"""What is missing for a run of the whole workflow, all at once and before it begins, each in one sentence."""

import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import srsly
import typer
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.download import HubUnreachable, encoder_files, encoder_problems, hub_commit, local_folder, recorded

ON_CPU = "or run on the CPU: `spacy project run all . --vars.gpu_id -1`"
GB = 10**9
# xlm-roberta-base: 1.1 GB each in the assets, two checkpoints, package and wheel, and some while they're written
NEED = 8 * GB
NEED_PER_WEIGHTS = 7
PRODUCED = ("assets", "corpus", "training", "metrics", "packages")


@dataclass
class Findings:
    """Sentences for the user: `problems` stop the run, `warnings` and `good` don't."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    good: list[str] = field(default_factory=list)


def check_gpu(gpu_id: str, findings: Findings) -> None:
    """Find out whether PyTorch and CuPy can compute on that GPU."""
    try:
        number = int(gpu_id)
    except ValueError:
        number = -2
    if number < -1:
        findings.problems.append(
            f"gpu_id is {gpu_id!r}; expected -1 for the CPU or the number of a GPU: `--vars.gpu_id 0`."
        )
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number == -1:
        there = f"; GPU 0 is there, {torch.cuda.get_device_name(0)}: `--vars.gpu_id 0` is faster" if count else ""
        findings.good.append(f"Runs on the CPU{there}")
        return
    if torch.version.cuda is None:
        findings.problems.append(
            f"PyTorch {torch.__version__} is built without CUDA; install a PyTorch with CUDA and "
            f"requirements-gpu.txt, {ON_CPU}."
        )
    elif not count:
        findings.problems.append(f"PyTorch finds no CUDA device; check `nvidia-smi` and the driver, {ON_CPU}.")
    elif number >= count:
        findings.problems.append(
            f"There is no GPU {number}, only {', '.join(map(str, range(count)))}; set `--vars.gpu_id 0`, {ON_CPU}."
        )
    else:
        findings.good.append(f"Runs on GPU {number}, {torch.cuda.get_device_name(number)}")
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        findings.problems.append(
            f"CuPy, which spaCy needs on a GPU, can't be imported; `pip install -r requirements-gpu.txt`, {ON_CPU}."
        )
        return
    if number < count:
        try:
            with cupy.cuda.Device(number):
                cupy.arange(2).sum().item()  # compiles a kernel, which needs the CUDA headers and a fitting driver
        except Exception as error:  # CUDARuntimeError, CompileException, ImportError of a library, ...
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            findings.problems.append(
                f"CuPy can't compute on GPU {number} ({reason}); `pip install -r requirements-gpu.txt` anew, {ON_CPU}."
            )


def check_sources(sources: Mapping[str, str], assets: Path, findings: Findings) -> None:
    """Find out whether the dataset and the encoder (the keys of `sources`) are there, on this machine or on the Hub."""
    on_hub = {}
    for kind, name in sources.items():
        try:
            folder = local_folder(name, kind)
        except UserError as error:
            findings.problems.append(str(error))
            continue
        part = "data" if kind == "dataset" else "encoder"
        if folder is None and not recorded(assets, part, {"kind": "hub", "source": name}):
            on_hub[kind] = name
            continue
        problems = encoder_problems(folder, name) if folder and kind == "encoder" else []
        findings.problems += problems
        if not problems:
            findings.good.append(f"{kind.capitalize()} {name} is there")
    unanswered = dict(on_hub)
    for kind, name in on_hub.items():
        try:
            hub_commit(name, kind, timeout=5)
            findings.good.append(f"{kind.capitalize()} {name} is on the Hub")
        except HubUnreachable as error:
            message = str(HubUnreachable(unanswered, error.reason))
            if all(_in_cache(name, kind) for kind, name in unanswered.items()):
                findings.warnings.append(f"{message} This machine's cache has a copy, which download will try.")
            else:
                findings.problems.append(message)
            break  # the rest would only time out as well
        except UserError as error:
            findings.problems.append(str(error))
        del unanswered[kind]


def _in_cache(name: str, kind: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type="dataset" if kind == "dataset" else "model")
    return (Path(HF_HUB_CACHE) / folder / "snapshots").is_dir()


def check_disk(encoder: str, assets: Path, findings: Findings) -> None:
    """Find out whether the disk of the assets has room for a run; what an earlier run left is counted as room."""
    need = NEED
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        weights = (file for file in encoder_files(folder) if file.suffix == ".safetensors")
        need = NEED_PER_WEIGHTS * sum(file.stat().st_size for file in weights)
    project = assets.resolve().parent
    produced = (file for name in PRODUCED for file in (project / name).rglob("*"))
    own = sum(file.stat().st_size for file in produced if file.is_file() and not file.is_symlink())
    existing = next(path for path in (project, *project.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free + own < need:
        findings.problems.append(
            f"{existing}: {free / GB:.1f} GB are free on its disk, a run with {encoder} takes about "
            f"{need / GB:.1f} GB; free some space, move the project, or set a smaller --vars.encoder."
        )
    else:
        findings.good.append(f"{free / GB:.1f} GB are free, about {need / GB:.1f} GB needed")


def mend_lock(path: Path, findings: Findings) -> None:
    """Drop from project.lock, where spaCy notes which commands are done, what is no such note.

    spaCy writes the file in place, so that a full disk or a kill can cut it off, and then stops at it in every run.
    """
    if not path.exists():
        return
    try:
        notes = srsly.read_yaml(path)
    except ValueError:  # UnicodeDecodeError too
        notes = None
    whole = {name: note for name, note in notes.items() if isinstance(note, dict)} if isinstance(notes, dict) else {}
    if whole != notes:
        with replacing(path) as temporary:
            srsly.write_yaml(temporary, whole)
        findings.warnings.append(
            f"{path}: cut off, an earlier run was stopped while it was written; commands that it no longer notes as "
            "done run again."
        )


def main(
    gpu_id: Annotated[str, typer.Option(help="Number of the GPU, -1 for the CPU")],
    dataset: Annotated[str, typer.Option(help="The dataset that download will be given")],
    encoder: Annotated[str, typer.Option(help="The encoder that download will be given")],
    assets: Annotated[Path, typer.Option(help="The folder that download will fill")] = Path("assets"),
    lock: Annotated[Path, typer.Option(help="Where spaCy notes what is done")] = Path("project.lock"),
) -> None:
    """Say what is missing for a run of the whole workflow, and what to do about it."""
    with one_sentence():
        findings = Findings()
        mend_lock(lock, findings)
        check_gpu(gpu_id, findings)
        check_sources({"dataset": dataset, "encoder": encoder}, assets, findings)
        check_disk(encoder, assets, findings)
    for sentence in findings.good:
        msg.good(sentence)
    for sentence in findings.warnings:
        msg.warn(sentence)
    for sentence in findings.problems:
        msg.fail(sentence)
    if findings.problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
