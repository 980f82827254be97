"""XLM-R's own tokenizers, built from our SentencePiece file, against the same pieces in a tokenizer.json."""

import unicodedata

import numpy as np
import pytest
import sentencepiece
from transformers import XLMRobertaTokenizer, XLMRobertaTokenizerFast

from benchmarks.sentencepiece_file import write_sentencepiece
from scripts import build_encoder

LETTERS = list("▁abcdefghilmnopqrstuvz,.'èé12⁄")
WORDS = ["▁il", "▁pa", "zi", "ente", "▁ha", "▁la", "▁febbre", "▁dolore", "to", "re", "▁d", "▁perch", "▁1", "fi"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", *WORDS, *LETTERS, "<mask>"]
SCORES = [0.0] * 4 + [-2 - i / 100 for i in range(len(WORDS))] + [-5 - i / 100 for i in range(len(LETTERS))] + [0.0]
TEXTS = [
    "il paziente ha la febbre",
    "  dolore  toracico,\tda ieri. ",
    "perché l'è così",
    unicodedata.normalize("NFD", "perché è"),
    "ﬁn ½ １２",
    "il 漢字 XYZ ha",
    "",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    write_sentencepiece(PIECES, SCORES, path)
    return path


@pytest.fixture(scope="module")
def expected():
    """The ids of each text by the tokenizer that build_encoder makes of the same pieces and of nmt_nfkc's rules."""
    rules = {code: unicodedata.normalize("NFKC", chr(code)) for code in map(ord, "ﬁ½１２")} | {9: " "}
    sizes = dict(hidden=1, layers=1, heads=1, feed_forward=1, vocabulary=1, token_types=1, epsilon=1e-12, tensors={})
    weights = build_encoder.Weights(positions=512, pieces=PIECES, scores=np.array(SCORES), rules=rules, **sizes)
    return build_encoder.make_tokenizer(weights)(TEXTS)["input_ids"]


def test_the_fast_tokenizer_gives_the_same_ids(file, expected):
    assert XLMRobertaTokenizerFast(str(file))(TEXTS)["input_ids"] == expected


def test_the_slow_tokenizer_gives_the_same_ids(file, expected):
    assert XLMRobertaTokenizer(str(file))(TEXTS)["input_ids"] == expected


def test_sentencepiece_itself_opens_the_file(file):
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert model.encode("il paziente", out_type=str) == ["▁il", "▁pa", "zi", "ente"]


def test_pieces_in_another_order_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected the pieces"):
        write_sentencepiece(sorted(PIECES), SCORES, tmp_path / "file")
    assert not (tmp_path / "file").exists()
