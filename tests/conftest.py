"""Fixtures: the sample corpus, a tiny XLM-R, a trained project, its installed package, PAN-X.it where it is given."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
import torch
import typer
from click.testing import Result
from hypothesis import settings
from spacy.tokens.underscore import Underscore
from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizerFast
from typer.testing import CliRunner

import scripts.pipeline  # noqa: F401  registers what a trained pipeline is loaded with
from benchmarks.accuracy import copy_project
from lookup_ner import ruler
from scripts.panx import Sentence, read_tsv, to_tsv
from workflow import project_run

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "corpus" / "sample"
# many more examples, for `make fuzz`: HYPOTHESIS_PROFILE=long
settings.register_profile("long", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
# for the processes that tests start: none may ask a hub for anything
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

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
def panx_dir() -> Path:
    """The folder of the full PAN-X.it; its licence keeps it out of the project."""
    folder = Path(os.environ.get("PANX_DIR", ROOT.parent / "shared" / "panx-it"))
    if not (folder / "train-it.tsv").is_file():
        pytest.skip("the full PAN-X.it is not here: PANX_DIR names the folder of its {train,validation,test}-it.tsv")
    return folder


@pytest.fixture(scope="session")
def sample() -> dict[str, list[Sentence]]:
    return {split: read_tsv(SAMPLE / f"{split}.tsv") for split in ("train", "validation", "test")}


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, sample: dict[str, list[Sentence]]) -> Path:
    """An XLM-R of 2 layers with random weights, its tokenizer made from a SentencePiece file as the real one's is."""
    folder = tmp_path_factory.mktemp("tiny-xlm-r")
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(s.words) for s in sample["train"]), encoding="utf8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sentencepiece.bpe"), vocab_size=700, minloglevel=2
    )
    text.unlink()
    (folder / "sentencepiece.bpe.vocab").unlink()
    tokenizer = XLMRobertaTokenizerFast(vocab_file=str(folder / "sentencepiece.bpe.model"), model_max_length=512)
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = XLMRobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=514, type_vocab_size=1, **size)
    torch.manual_seed(0)
    XLMRobertaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a pipeline of rules that knows three names and loads at once; $MODEL names it to the examples."""
    folder = tmp_path_factory.mktemp("ruler") / "model"
    ruler({"Rita": "PER", "Torino": "LOC", "Bari": "LOC"}).to_disk(folder)
    scores = {"Rita": 0.75, "Torino": 0.5}  # Bari has none, like an entity of another pipe
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Underscore.span_extensions, "panx_score", (None, None, lambda span: scores.get(span.text), None))
        patch.setenv("MODEL", str(folder))
        yield folder


def invoke(command: Callable[..., None], *arguments: object) -> Result:
    """Runs a script's command as from the command line."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def refused() -> Callable[..., str]:
    """Runs a script's command, which must refuse its input; returns the one sentence that it prints."""

    def run(script: ModuleType, *arguments: object) -> str:
        result = invoke(script.main, *arguments)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.output.count("✘") == 1
        return " ".join(result.output.split())

    return run


@pytest.fixture(scope="session")
def variables(tiny_encoder: Path) -> dict[str, object]:
    """The variables of project.yml that the `project` is made with."""
    return {
        "gpu_id": -1,
        "dataset": "data",
        "dataset_config": "tiny",
        "encoder": str(tiny_encoder),
        "learning_rate": 0.002,
        "head_learning_rate_scale": 2,
        "batch_size": 6,
        "epochs": 10,
        "extra_train": "PAN-X.es",
        "slim_pieces": 400,
        **dict.fromkeys(("train_size", "dev_size", "test_size"), 0),
    }


@pytest.fixture(scope="session")
def project(tmp_path_factory, sample, variables) -> Path:
    """A copy of the project in which `all` ran: a tiny encoder learnt a few sentences by heart."""
    root = tmp_path_factory.mktemp("project")
    copy_project(root, further=())
    running = root / "corpus" / "running"
    running.mkdir(parents=True)
    (running / "a.txt").write_text("\n\n".join(["Piove.\nVive a [LOC Bari]."] * 10), encoding="utf8")
    data = root / "data"
    data.mkdir()
    for split in sample:
        (data / f"{split}.tsv").write_bytes(to_tsv([*sample["train"][:40], Sentence(("Bari",), ("B-LOC",))]))
        spanish = to_tsv([Sentence(("Sevilla",), ("B-LOC",)), Sentence(("hola",), ("O",))])
        (data / f"{split}-es.tsv").write_bytes(spanish)
    project_run(root, "all", variables)
    return root


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
    return {"HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}


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
