"""Runs the project's workflow as a user does, kills it at a chosen moment, and tells what it has made."""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import srsly

from conftest import vars_of

SEED = int(os.environ.get("FAULT_SEED", "0"))
SLOW = pytest.mark.skipif("FAULTS" not in os.environ, reason="make test-faults runs it: minutes")
UNFINISHED = "unfinished"
PRODUCTS = ("assets", "corpus", "training", "metrics", "packages")
SOURCES = ("project.yml", "LICENSE", "configs", "scripts", "data")


def unused_copy(project: Path, target: Path) -> Path:
    """A copy of a project and its data, in which nothing has run."""
    target.mkdir()
    for name in SOURCES:
        source = project / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target / name)
    return target


def options(project: Path, encoder: Path) -> list[str]:
    """What sets the variables that the finished project was run with."""
    variables = vars_of(project / "data", encoder)
    return [word for key, value in variables.items() for word in (f"--vars.{key}", str(value))]


def workflow(project: Path) -> list[str]:
    return srsly.read_yaml(project / "project.yml")["workflows"]["all"]


def contents(project: Path) -> dict[str, str]:
    """SHA-256 of every file that the workflow has made, by its path; of a wheel, of each file in it; UNFINISHED for
    what is not in its place yet.

    Left out is what no two runs have alike: the speed in metrics/test.json, a wheel's times, setuptools' build folders.
    """
    found = {}
    for name in PRODUCTS:
        for path in sorted((project / name).rglob("*")):
            parts = path.relative_to(project).parts
            if not path.is_file() or "build" in parts[2:3] or any(part.endswith(".egg-info") for part in parts):
                continue
            key = "/".join(parts)
            if "unfinished" in key or ".partial-" in key:
                found[key] = UNFINISHED
            elif path.suffix == ".whl":
                with zipfile.ZipFile(path) as archive:
                    members = [member for member in archive.namelist() if not member.endswith("/RECORD")]
                    found |= {f"{key}/{member}": digest(member, archive.read(member)) for member in members}
            else:
                found[key] = digest(key, path.read_bytes())
    return found


def digest(name: str, content: bytes) -> str:
    """SHA-256 of what all runs make alike of a product."""
    if name == "metrics/test.json":
        content = srsly.json_dumps(srsly.json_loads(content) | {"speed": None}).encode()
    return hashlib.sha256(content).hexdigest()


@dataclass
class Ended:
    """A run: its exit code, negative if it was killed; what it printed; in which command it was then; after how long
    in that command, in seconds.
    """

    code: int
    text: str
    command: str
    seconds: float


def run(
    project: Path,
    name: str,
    options: Sequence[str],
    scratch: Path,
    *,
    kill_in: str | None = None,
    moment: Callable[[], Callable[[float], bool]] | None = None,
) -> Ended:
    """`spacy project run NAME`. Once it is in the command `kill_in`, it and all that it has started is killed as soon
    as `moment()(seconds in that command)` is true.

    scratch: a folder for what it prints and for its temporary files.
    """
    scratch.mkdir(exist_ok=True)
    log = scratch / "printed.txt"
    # its own bytecode would be among the sources
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "spacy", "project", "run", name, ".", *options]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=project,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        began, is_time = 0.0, None
        try:
            while process.poll() is None:
                if is_time is None and kill_in and f" {kill_in} ==" in log.read_text():
                    began, is_time = time.monotonic(), moment()
                if is_time and is_time(time.monotonic() - began):
                    break
                time.sleep(0.001 if is_time else 0.01)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    names = re.findall(r"={3,} ([a-z-]+) ={3,}", text)
    return Ended(process.returncode, text, names[-1] if names else "", time.monotonic() - began)
