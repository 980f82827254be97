"""Runs the project's commands and tells what they have made."""

import hashlib
import multiprocessing
import os
import runpy
import sys
import zipfile
from pathlib import Path
from unittest.mock import patch

import spacy.cli
import srsly
from weasel.util import run_command

PRODUCTS = ("assets", "corpus", "training", "metrics", "packages")
# a process that has imported them forks for each command, which saves most of a short command's time
LIBRARIES = ["datasets", "matplotlib.pyplot", "pytest", "scipy.optimize", "seqeval.metrics.v1", "spacy.cli"]
LIBRARIES += ["spacy_transformers", "transformers.models.xlm_roberta.modeling_xlm_roberta", "wordfreq"]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(LIBRARIES)


def project_run(root: Path, name: str, variables: dict[str, object] | None = None) -> None:
    """`spacy project run NAME`, its Python commands in forks of a process that has imported the libraries."""
    with patch("weasel.cli.run.run_command", _run_forked):
        spacy.cli.project_run(root, name, overrides={f"vars.{key}": value for key, value in (variables or {}).items()})


def _run_forked(command: list[str], **options: object) -> None:
    if command[:2] != [sys.executable, "-m"]:
        run_command(command, **options)
        return
    process = _server.Process(target=_run_module, args=(command[2:],))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def _run_module(arguments: list[str]) -> None:
    sys.path.insert(0, os.getcwd())  # the scripts of the copy, which is the current folder
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def contents(project: Path) -> dict[str, str]:
    """SHA-256 of every file that the workflow has made, and of each file in a wheel, without the measured speed."""
    found = {}
    for path in sorted(path for name in PRODUCTS for path in (project / name).rglob("*") if path.is_file()):
        key = str(path.relative_to(project))
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                found |= {f"{key}/{name}": _sha256(archive.read(name)) for name in archive.namelist()}
        elif key == "metrics/test.json":
            found[key] = _sha256(srsly.json_dumps(srsly.read_json(path) | {"speed": None}).encode())
        else:
            found[key] = _sha256(path.read_bytes())
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
