"""The installed package: a fresh venv with the wheel and what it declares, offline, in a folder of its own."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

# runs one piece of code a line and answers with what it leaves in `result`, or with its traceback
LOOP = """
import json, sys, traceback
import spacy
nlp = spacy.load("it_panx_xlmr")
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    names = {"spacy": spacy, "nlp": nlp}
    try:
        exec(json.loads(line), names)
        answer = {"result": names["result"]}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def python(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The venv's Python; versions are those of requirements.txt, what is installed is what the wheel declares."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (wheel,) = (project / "packages").rglob("*.whl")
    pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "requirements.txt", wheel], check=True)
    return venv / "bin" / "python"


@pytest.fixture(scope="session")
def offline() -> dict[str, str]:
    """The whole environment in which the package runs: no hub, nothing of this project."""
    return {"HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def run(
    python: Path, offline: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Any]]:
    """Runs code in the venv, where `nlp` is the package, and gives what it leaves in `result`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with subprocess.Popen(
        [python, "-c", LOOP], cwd=folder, env=offline, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def call(code: str) -> Any:
            process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert "error" not in answer, answer["error"]
            return answer["result"]

        yield call
        process.stdin.close()
