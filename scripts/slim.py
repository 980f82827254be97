"""Makes a trained pipeline small: wordpieces that its language does not need are dropped, weights stored in 8 bits.

Three quarters of xlm-roberta-base are embeddings of 250,002 wordpieces, most of them of other languages. Kept are those
of all training sentences that the data has, those of the language's most frequent words (wordfreq, Speer 2022), all of
a single character, the special tokens, and of the other wordpieces in the language's script the most probable ones. A
unigram tokenizer takes the most probable way to cut a text, so a text whose own wordpieces are all kept is cut as
before, and every vector of it stays the same; another one is cut into smaller pieces.
"""

import itertools
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import spacy
import srsly
import torch
import typer
import wordfreq
from spacy.language import Language
from spacy.tokens import DocBin
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from wasabi import msg

from scripts.common import UserError, link_or_copy, one_sentence, replacing
from scripts.convert import make_doc, repair
from scripts.panx import read_tsv, split_path
from scripts.pipeline import load_pipeline
from scripts.pipeline.encoder import PanxTransformerModel, row_scales

WORDS = 150_000  # of wordfreq's list: further ones bring hardly any wordpiece
SHARE = 0.05  # of a text's letters: a script with fewer of them is not its language's


def frequent_words(lang: str) -> list[str]:
    """The language's most frequent words, in lower case and with a capital; none for a language wordfreq lacks."""
    try:
        words = wordfreq.top_n_list(lang, WORDS)
    except LookupError:
        msg.warn(f"wordfreq knows no words of {lang!r}; the training sentences alone say what is needed most.")
        return []
    return [*words, *(word.capitalize() for word in words)]


def scripts(text: str) -> Counter[str]:
    """How many of the text's letters each script has, by the first word of their Unicode names: LATIN, GREEK, CJK."""
    return Counter(unicodedata.name(character, "?").split()[0] for character in text if character.isalpha())


def needed_ids(
    tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str], words: Sequence[str], pieces: int
) -> list[int]:
    """The ids, in order, of the wordpieces to keep.

    These are the special tokens, all of a single character, all of the sentences and of the words, and then the most
    probable ones in the sentences' scripts, until there are `pieces` in all.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])  # the most probable first
    kept = {*tokenizer.all_special_ids, tokenizer.unk_token_id} - {None}
    kept |= {number for piece, number in vocabulary if len(piece) == 1}
    for encoding in tokenizer.backend_tokenizer.encode_batch([*sentences, *words], add_special_tokens=False):
        kept.update(encoding.ids)
    letters = scripts("".join(sentences))
    own = {script for script, count in letters.items() if count >= SHARE * letters.total()}
    others = (number for piece, number in vocabulary if number not in kept and own.issuperset(scripts(piece)))
    kept.update(itertools.islice(others, max(pieces - len(kept), 0)))
    return sorted(kept)


def trim(model: PanxTransformerModel, kept: Sequence[int]) -> None:
    """Drops all wordpieces but those with the ids `kept`, ascending, from the tokenizer and from the embeddings.

    Raises UserError for a tokenizer that is no unigram model: another kind would cut a text's other words anew; and for
    one with tokens beside the model's wordpieces.
    """
    objects = model.layers[0].shims[0]._hfmodel
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if objects.vocab_file_contents is not None:
            objects.tokenizer.vocab_file = str(folder / "whole")
            Path(objects.tokenizer.vocab_file).write_bytes(objects.vocab_file_contents)
        objects.tokenizer.save_pretrained(folder)
        description = srsly.read_json(folder / "tokenizer.json")
        if description["model"]["type"] != "Unigram":
            raise UserError(
                f"The tokenizer is a {description['model']['type']} model, expected Unigram (XLM-R's kind); keep all "
                "wordpieces with --vars.slim false."
            )
        own = {*kept, *(token["id"] for token in description["added_tokens"])}
        if not own <= set(range(len(description["model"]["vocab"]))) & set(kept):
            raise UserError(
                "The tokenizer has tokens that are not among its wordpieces, or that are not special; keep all "
                "wordpieces with --vars.slim false."
            )
        srsly.write_json(folder / "tokenizer.json", trimmed_description(description, kept))
        if objects.vocab_file_contents is not None:
            pieces = {description["model"]["vocab"][number][0] for number in kept}
            file = folder / objects.tokenizer.vocab_files_names["vocab_file"]
            objects.vocab_file_contents = trimmed_sentencepiece(objects.vocab_file_contents, pieces)
            file.write_bytes(objects.vocab_file_contents)
        objects.tokenizer = AutoTokenizer.from_pretrained(folder)
    transformer = objects.transformer
    old = transformer.get_input_embeddings()
    new = torch.nn.Embedding(len(kept), old.embedding_dim, padding_idx=objects.tokenizer.pad_token_id)
    new.weight.data = old.weight.data[torch.tensor(kept, device=old.weight.device)].clone()
    transformer.set_input_embeddings(new)
    transformer.config.vocab_size = len(kept)
    for token in ("pad", "bos", "eos", "unk"):
        number = getattr(objects.tokenizer, f"{token}_token_id")
        if getattr(transformer.config, f"{token}_token_id", None) is not None:
            setattr(transformer.config, f"{token}_token_id", number)


def trimmed_description(description: dict, kept: Sequence[int]) -> dict:
    """A tokenizer.json with the wordpieces `kept`, renumbered in their order."""
    number_of = {old: new for new, old in enumerate(kept)}
    model = description["model"]
    vocabulary = [model["vocab"][old] for old in kept]
    added = [token | {"id": number_of[token["id"]]} for token in description["added_tokens"]]
    trimmed = description | {"added_tokens": added}
    trimmed["model"] = model | {"vocab": vocabulary, "unk_id": number_of[model["unk_id"]]}
    special = (description.get("post_processor") or {}).get("special_tokens")
    if special:
        renumbered = {k: token | {"ids": [number_of[i] for i in token["ids"]]} for k, token in special.items()}
        trimmed["post_processor"] = description["post_processor"] | {"special_tokens": renumbered}
    return trimmed


def trimmed_sentencepiece(model: bytes, pieces: set[str]) -> bytes:
    """A SentencePiece file with those of its pieces that are in `pieces`, and its special ones; all else as it is.

    The file is a protocol buffer; its pieces are the fields number 1, each of which has its text as field number 1 and
    its type as number 3 (sentencepiece_model.proto).
    """
    kept = bytearray()
    for field, start, value, end in _fields(model):
        if field == 1:
            inner = {number: content for number, _, content, _ in _fields(value)}
            normal = inner.get(3, 1) == 1
            if normal and inner[1].decode("utf8") not in pieces:
                continue
        kept += model[start:end]
    return bytes(kept)


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes | int, int]]:
    """(number, where it begins, its value, where it ends) of each field of a protocol buffer message."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        start = place
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
        else:
            length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            value = message[place : place + length]
            place += length
        yield number, start, value, place


def round_weights(model: PanxTransformerModel, bits: int) -> None:
    """Rounds the transformer's weights to what fits into so many bits, in which they are then stored.

    bits: 8, each row of a matrix then has a scale of its own and the other weights have 16; or 16 (IEEE 754 binary16).
    Raises UserError for another number, and for a weight that is too large for 16 bits.
    """
    if bits not in (8, 16):
        raise UserError(
            f"Weights cannot be stored in {bits} bits, expected 8 or 16; set --vars.slim_bits to one of them."
        )
    for name, parameter in model.transformer.named_parameters():
        weights = parameter.data
        if bits == 8 and weights.dim() == 2:
            scales = row_scales(weights)
            parameter.data = (weights / scales).round() * scales
        elif torch.isfinite(weights.half()).all():
            parameter.data = weights.half().float()
        else:
            raise UserError(f"The weights {name} do not fit into 16 bits; store them in full with --vars.slim false.")


def training_texts(data: Path, corpus: Path, lang: str) -> list[str]:
    """All training sentences of the data, also those that were not trained on, and those of the corpus."""
    sentences = [repair(sentence)[0] for sentence in read_tsv(split_path(data, "train", lang))]
    vocab = spacy.blank(lang).vocab
    docs = [make_doc(vocab, sentence) for sentence in sentences if sentence.words]
    return [doc.text for doc in [*docs, *DocBin().from_disk(corpus).get_docs(vocab)]]


def slim(nlp: Language, sentences: Sequence[str], lang: str, pieces: int, bits: int) -> tuple[int, int]:
    """Trims the vocabulary and rounds the weights of a trained pipeline; returns how many wordpieces it had and has."""
    model = nlp.get_pipe("transformer").model
    before = len(model.tokenizer)
    kept = needed_ids(model.tokenizer, sentences, frequent_words(lang), pieces)
    trim(model, kept)
    round_weights(model, bits)
    return before, len(kept)


def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for what is evaluated and packaged", show_default=False)],
    make_slim: Annotated[bool, typer.Argument(help="false: leave it as it is", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder with the training sentences as TSV")],
    corpus: Annotated[Path, typer.Option(help="The sentences that were trained on (.spacy)")],
    lang: Annotated[str, typer.Option(help="Language whose most frequent words' wordpieces are kept")],
    pieces: Annotated[int, typer.Option(help="Wordpieces to keep in all", min=1)],
    bits: Annotated[int, typer.Option(help="Bits of a weight: 8 or 16")],
) -> None:
    """Drop the wordpieces that the language does not need and store the weights in few bits."""
    with one_sentence(), replacing(output) as folder:
        if not make_slim:
            shutil.copytree(model, folder, copy_function=link_or_copy)
            msg.good(f"{output}: the trained pipeline as it is")
            return
        nlp = load_pipeline(model)
        before, after = slim(nlp, training_texts(data, corpus, lang), lang, pieces, bits)
        nlp.to_disk(folder)
        sizes = [(path / "transformer" / "model").stat().st_size / 1e6 for path in (model, folder)]
        msg.good(f"{output}: {after:,} of {before:,} wordpieces; {sizes[1]:,.0f} MB instead of {sizes[0]:,.0f} MB")


if __name__ == "__main__":
    typer.run(main)
