"""Writes a vocabulary in XLM-R's layout as the SentencePiece file that XLMRobertaTokenizer loads."""

import io
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

XLMR_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
XLMR_MASK = "<mask>"


def write_sentencepiece(pieces: Sequence[str], scores: Sequence[float], path: Path) -> None:
    """Writes `pieces` as a SentencePiece unigram model to `path` (by custom named `sentencepiece.bpe.model`).

    `pieces` and `scores` (log probabilities) are in XLM-R's id order: `<s> <pad> </s> <unk>`, the word pieces,
    `<mask>`; so is the `vocab` of an XLM-R `tokenizer.json`. The file holds `<unk> <s> </s>` and then the word pieces,
    one place lower than their id: the tokenizer adds that one back, and `<pad>` and `<mask>` with it (the "fairseq
    offset", see transformers' `tokenization_xlm_roberta.py`).

    Texts are normalised by the nmt_nfkc of the installed SentencePiece. Since XLM-R was trained, in 2019, it has gained
    the characters of later Unicode versions, and it now keeps a zero-width joiner that was then made a space; on other
    texts the ids are XLM-R's.

    Raises ValueError if the specials are not in their places or a score is missing, OSError if `path` can't be written.
    """
    if [*pieces[:4], pieces[-1]] != [*XLMR_SPECIALS, XLMR_MASK] or len(scores) != len(pieces):
        raise ValueError(
            f"expected the pieces {XLMR_SPECIALS} first, {XLMR_MASK} last and a score for each; "
            f"got {list(pieces[:4])}, {pieces[-1]} and {len(scores)} scores for {len(pieces)} pieces"
        )
    model = _model_without_pieces()
    kind = ModelProto.SentencePiece
    model.pieces.add(piece="<unk>", score=0.0, type=kind.UNKNOWN)
    model.pieces.add(piece="<s>", score=0.0, type=kind.CONTROL)
    model.pieces.add(piece="</s>", score=0.0, type=kind.CONTROL)
    for piece, score in zip(pieces[4:-1], scores[4:-1], strict=True):
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())


def _model_without_pieces() -> ModelProto:
    # SentencePiece gives out its compiled nmt_nfkc table only inside a trained model, so a few words are trained on.
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]),
        model_writer=trained,
        model_type="unigram",
        vocab_size=8,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    model = ModelProto.FromString(trained.getvalue())
    assert model.trainer_spec.model_type == TrainerSpec.UNIGRAM and model.trainer_spec.unk_id == 0
    del model.pieces[:]
    return model
