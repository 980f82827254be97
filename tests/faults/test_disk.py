"""Disks that are full or may only be read: one sentence, nothing half-written, and the next run goes on."""

import errno
import random
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner
from weasel.cli.run import load_project_config

from conftest import TRAINED
from killing import SEED, SLOW, contents, digest, options, run, unused_copy, workflow
from scripts import calibrate, configure, convert, download, evaluate, report, slim
from scripts import package as prepare_package
from scripts.common import replacing

FULL, READ_ONLY = "No space left on device", "Read-only file system"
SIZE = 32 << 20


class Disk:
    """A small disk of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def fill(self, free: int = 0):
        """Leaves so many bytes free; files without content still have room."""
        with (self.folder / "ballast").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            file.truncate(max(file.tell() - free, 0))

    def empty(self):
        (self.folder / "ballast").unlink()

    def read_only(self, *, yes: bool):
        subprocess.run(["mount", "-o", f"remount,{'ro' if yes else 'rw'}", self.folder], check=True)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")} - {"ballast"}


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small disk can be mounted here: run the tests as root")
    yield Disk(folder)
    subprocess.run(["umount", "-l", folder], check=True)


def arguments(name: str, target: Path, encoder: Path) -> tuple[list[object], list[str]]:
    """A script's arguments in a finished project, all that it writes below `target`; and what that is there called."""
    words = {
        "download": [*("--output", target, "--checksums", "configs/checksums.json", "--dataset", "data")]
        + [*("--extra-train", "PAN-X.es")]
        + [*("--dataset-config", "tiny", "--dataset-revision", "x", "--encoder-revision", "x", "--lang", "it")]
        + ["--encoder", encoder],
        "convert": ["assets/data", target, "--extra-train", "assets/extra_train"],
        "configure": ["configs/xlmr.cfg", target / "config.cfg", "--batch-size", 24, "--seed", 42, "--lang", "it"]
        + ["--gpu-id", -1, "--epochs", TRAINED["epochs"]]
        + ["--learning-rate", TRAINED["learning_rate"]]
        + ["--head-learning-rate-scale", TRAINED["head_learning_rate_scale"]],
        "slim": ["training/model-last", target / "model-slim", "true", "--data", "assets/data", "--lang", "it"]
        + ["--corpus", "corpus/train.spacy", "--pieces", TRAINED["slim_pieces"], "--bits", 8],
        "calibrate": ["training/model-slim", target / "model", "--corpus", "corpus/dev.spacy"],
        "evaluate": ["training/model", "corpus/test.spacy"]
        + ["--raw-text", target / "raw_text.json", "--seqeval", target / "seqeval.json"],
        "report": ["training/model", "corpus/test.spacy", "--output", target / "report.html"],
        "prepare_package": ["training/model", target / "model-package", "true"]
        + ["--lang", "it", "--name", "panx_xlmr", "--version", "1.0.0"],
    }[name]
    made = {
        "download": ["assets"],
        "convert": [f"corpus/{file}" for file in ("train.spacy", "dev.spacy", "test.spacy", "stats.json")],
        "configure": ["training/config.cfg"],
        "slim": ["training/model-slim"],
        "calibrate": ["training/model"],
        "evaluate": ["metrics/raw_text.json", "metrics/seqeval.json"],
        "report": ["metrics/report.html"],
        "prepare_package": ["training/model-package"],
    }[name]
    return words, made


SCRIPTS = [download, convert, configure, slim, calibrate, evaluate, report, prepare_package]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_on_a_full_or_read_only_disk(project, tiny_encoder, disk, refused, monkeypatch, tmp_path, script):
    monkeypatch.chdir(shutil.copytree(project, tmp_path / "project"))  # prepare_package removes the package there
    target = disk.folder / "products"
    target.mkdir()
    words, made = arguments(script.__name__, target, tiny_encoder)
    for reason in (FULL, READ_ONLY):
        disk.fill() if reason == FULL else disk.read_only(yes=True)
        sentence = refused(script, *words)
        disk.empty() if reason == FULL else disk.read_only(yes=False)
        assert f"✘ {target}" in sentence
        assert f"{reason}" in sentence
        assert "free the space or the path it names and run the command again." in sentence
        assert disk.files() == {"products"}
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    for path in made:
        there = target if path == "assets" else target / Path(path).name
        assert files(there) == files(project / path)


def files(path: Path) -> dict[str, str]:
    found = [(str(file.relative_to(path)), file) for file in (path, *path.rglob("*")) if file.is_file()]
    return {name: digest(name, file.read_bytes()) for name, file in found}


def test_a_file_that_may_not_grow_is_named(tmp_path):
    """As on a disk that is full, and where none can be mounted."""
    path = tmp_path / "file"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match="File too large") as error, replacing(path) as temporary:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            temporary.write_text("new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


@SLOW
def test_the_disk_is_full_in_each_command(project, tiny_encoder, disk, tmp_path):
    """spaCy's own commands say it in their own words; whatever they leave, the next run ends as an undisturbed one."""
    chance = random.Random(SEED)
    variables = options(project, tiny_encoder)
    copy = unused_copy(project, disk.folder / "project")
    for command in workflow(copy):
        size = sum(
            path.stat().st_size
            for output in outputs(project, command)
            for path in (project / output, *(project / output).rglob("*"))
            if path.is_file()
        )
        disk.fill(free=int(chance.random() * size))
        ended = run(copy, command, variables, tmp_path / "scratch")  # not `all`, whose `check` would stop it
        disk.empty()
        print(f"{command}, which makes {size} bytes: exit code {ended.code} in {ended.command}")
        print("\n".join(ended.text.splitlines()[-12:]))
        ended = run(copy, command, variables, tmp_path / "scratch")
        assert ended.code == 0, ended.text
    ended = run(copy, "all", variables, tmp_path / "scratch")
    assert ended.code == 0, ended.text
    assert contents(copy) == contents(project)


def outputs(project: Path, command: str) -> list[str]:
    (found,) = (c for c in load_project_config(project)["commands"] if c["name"] == command)
    return found.get("outputs", [])
