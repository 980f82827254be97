"""Where nothing can be written, a script says so in one sentence and leaves nothing half-written."""

import contextlib
import resource
import tempfile

import pytest

from scripts import configure, convert, download, evaluate, package, report, slim
from scripts.common import replacing

DATASET = ["--dataset", "data", "--dataset-config", "tiny", "--dataset-revision", "x", "--lang", "it"]
NUMBERS = {"learning-rate": 0.002, "head-learning-rate-scale": 2, "batch-size": 24, "epochs": 1, "seed": 42}
NUMBERS |= {"encoder-dropout": 0, "letter-case": 0, "threshold": 0.45}
# arguments of each script in a finished project; OUT is the folder of all that it writes
SCRIPTS = {
    download: [*DATASET, "--output", "OUT", "--checksums", "configs/checksums.json", "--extra-train", "PAN-X.es"]
    + ["--encoder", "assets/encoder", "--encoder-revision", "x"],
    convert: ["assets/data", "OUT", "--extra-train", "assets/extra_train"],
    configure: ["configs/xlmr.cfg", "OUT/config.cfg", "--lang", "it", "--gpu-id", -1]
    + [word for name, value in NUMBERS.items() for word in (f"--{name}", value)],
    slim: ["training/model-last", "OUT/model", "true", "--data", "assets/data", "--corpus", "corpus/train.spacy"]
    + ["--dev", "corpus/dev.spacy", "--lang", "it", "--pieces", 400, "--bits", 8],
    evaluate: ["training/model", "corpus/test.spacy", "--output", "OUT"],
    report: ["training/model", "corpus/test.spacy", "--output", "OUT/report.html"],
    package: ["training/model", "OUT/model-package", "true"]
    + ["--lang", "it", "--name", "panx_xlmr", "--version", "1.0.0"],
}


@contextlib.contextmanager
def no_space():
    """No file can grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_disk(path):
    """`replacing` on a full disk."""
    with replacing(path) as temporary, no_space():
        yield temporary


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_on_a_full_disk_names_the_file_and_leaves_nothing(project, refused, monkeypatch, tmp_path, script):
    monkeypatch.chdir(project)
    monkeypatch.setattr(script, "replacing", full_disk)
    sentence = refused(script, *(str(word).replace("OUT", str(tmp_path)) for word in SCRIPTS[script]))
    assert f"✘ {tmp_path}" in sentence
    assert "File too large; free the space or the path it names and run the command again." in sentence
    assert list(tmp_path.rglob("*")) == []


def test_a_full_temporary_folder_is_named(project, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with no_space():
        sentence = refused(evaluate, "training/model", "corpus/test.spacy", "--output", tmp_path)
    assert f"✘ {tmp_path}: File too large; free the space" in sentence
