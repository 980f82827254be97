"""Finish a trained pipeline: prune the wordpieces, quantize the weights to 8 bits, calibrate the probabilities.

Two thirds of the weights of xlm-roberta-base are embeddings of wordpieces, most of them for other languages. The
wordpieces to keep are those of all training sentences of the data, those of the language's most frequent words
(wordfreq, Speer 2022), all of a single character, the special tokens, and then the most probable ones in the language's
script. A unigram tokenizer takes the most probable segmentation of a text. So a text whose own wordpieces are all kept
is segmented as before and has the same vectors; any other text is segmented into smaller pieces.
"""

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import spacy
import torch
import typer
import wordfreq
from spacy.tokens import DocBin
from spacy.training import Corpus
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from wasabi import msg

from scripts.calibrate import find_temperature
from scripts.common import UserError, one_sentence, replacing
from scripts.convert import make_doc, repair
from scripts.panx import read_tsv, split_path
from scripts.pipeline import load_pipeline
from scripts.pipeline.encoder import PanxTransformerModel, prepare_tokenizer
from scripts.pipeline.tokenizer import encoder_text
from scripts.pipeline.weights import row_scales

WORDS = 150_000  # of wordfreq's list; more words add hardly any wordpiece
MIN_SHARE = 0.05  # a script belongs to the language if at least this share of the letters is in it


def frequent_words(lang: str) -> list[str]:
    """Return the language's most frequent words in lower, title and upper case; none if wordfreq lacks the language."""
    try:
        words = wordfreq.top_n_list(lang, WORDS)
    except LookupError:
        msg.warn(f"wordfreq has no words for {lang!r}; wordpieces are chosen by the training sentences alone.")
        return []
    return [form for word in words for form in (word, word.capitalize(), word.upper())]


def letters_by_script(text: str) -> Counter[str]:
    """Count the letters of each script, named by the first word of their Unicode names: LATIN, GREEK, CJK."""
    return Counter(unicodedata.name(character, "?").split()[0] for character in text if character.isalpha())


def needed_ids(
    tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str], words: Sequence[str], pieces: int
) -> list[int]:
    """Return the sorted ids of the wordpieces to keep.

    These are the special tokens, all of a single character, and all of the words and the sentences, the latter also in
    upper and in lower case. If they are fewer than `pieces`, the most probable others in the sentences' scripts follow.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])  # the most probable first
    kept = {*tokenizer.all_special_ids, tokenizer.unk_token_id} - {None}
    kept |= {number for piece, number in vocabulary if len(piece) == 1}
    texts = [case(sentence) for case in (str, str.upper, str.lower) for sentence in sentences] + [*words]
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        kept.update(encoding.ids)
    letters = letters_by_script("".join(sentences))
    own = {script for script, count in letters.items() if count >= MIN_SHARE * letters.total()}
    others = (number for piece, number in vocabulary if number not in kept and own.issuperset(letters_by_script(piece)))
    kept.update(itertools.islice(others, max(pieces - len(kept), 0)))
    return sorted(kept)


def prune(model: PanxTransformerModel, kept: Sequence[int]) -> None:
    """Remove all wordpieces but those with the ids `kept`, ascending, from the tokenizer and the embeddings.

    A SentencePiece file is dropped: the tokenizer's JSON has the same pieces, and a fast tokenizer reads nothing else.
    Raise UserError if the tokenizer has tokens outside its model, or is not a unigram model: others may cut a kept word
    differently without the removed wordpieces.
    """
    objects = model.layers[0].shims[0]._hfmodel
    tokenizer = objects.tokenizer
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    if description["model"]["type"] != "Unigram":
        raise UserError(
            f"The tokenizer is a {description['model']['type']} model, expected Unigram (XLM-R's kind); keep all "
            "wordpieces with --vars.slim false."
        )
    added = {token["id"] for token in description["added_tokens"]}
    if not added <= set(range(len(description["model"]["vocab"]))) & set(kept):
        raise UserError(
            "The tokenizer has tokens that are not among its wordpieces, or that are not special; keep all "
            "wordpieces with --vars.slim false."
        )
    objects.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(pruned_description(description, kept))),
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map_extended,
    )
    prepare_tokenizer(objects.tokenizer)
    objects.vocab_file_contents = None
    transformer = objects.transformer
    old = transformer.get_input_embeddings().weight.data
    rows = old[torch.tensor(kept, device=old.device)]
    padding = objects.tokenizer.pad_token_id
    transformer.set_input_embeddings(torch.nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=padding))
    transformer.config.vocab_size = len(kept)
    for token in ("pad", "bos", "eos", "unk"):
        number = getattr(objects.tokenizer, f"{token}_token_id")
        if getattr(transformer.config, f"{token}_token_id", None) is not None:
            setattr(transformer.config, f"{token}_token_id", number)


def pruned_description(description: dict, kept: Sequence[int]) -> dict:
    """Return a tokenizer.json with only the wordpieces `kept`, renumbered in their order."""
    number_of = {old: new for new, old in enumerate(kept)}
    model = description["model"]
    vocabulary = [model["vocab"][old] for old in kept]
    added = [token | {"id": number_of[token["id"]]} for token in description["added_tokens"]]
    pruned = description | {"added_tokens": added}
    pruned["model"] = model | {"vocab": vocabulary, "unk_id": number_of[model["unk_id"]]}
    special = (description.get("post_processor") or {}).get("special_tokens")
    if special:
        renumbered = {k: token | {"ids": [number_of[i] for i in token["ids"]]} for k, token in special.items()}
        pruned["post_processor"] = description["post_processor"] | {"special_tokens": renumbered}
    return pruned


def round_weights(model: PanxTransformerModel, bits: int) -> None:
    """Round the transformer's weights to values that the pipeline stores losslessly in `bits` bits.

    bits: 8, with a scale per row of a matrix and 16 bits for the other weights, or 16 (IEEE 754 binary16).
    Raise UserError for another number, and for a weight that is too large for 16 bits.
    """
    if bits not in (8, 16):
        raise UserError(f"slim_bits is {bits}, expected 8 or 16; set --vars.slim_bits to one of them.")
    for name, parameter in model.transformer.named_parameters():
        weights = parameter.data
        if bits == 8 and weights.dim() == 2:
            scales = row_scales(weights)
            parameter.data = (weights / scales).round() * scales
        elif torch.isfinite(weights.half()).all():
            parameter.data = weights.half().float()
        else:
            raise UserError(f"The weights {name} do not fit into 16 bits; keep 32 bits with --vars.slim false.")


def training_texts(data: Path, corpus: Path, lang: str) -> list[str]:
    """Return all training sentences of the data, trained on or not, and the corpus's, as the encoder reads them."""
    sentences = [repair(sentence)[0] for sentence in read_tsv(split_path(data, "train", lang))]
    vocab = spacy.blank(lang).vocab
    docs = [make_doc(vocab, sentence) for sentence in sentences if sentence.words]
    return [encoder_text(doc)[0] for doc in [*docs, *DocBin().from_disk(corpus).get_docs(vocab)]]


def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for the finished pipeline", show_default=False)],
    make_slim: Annotated[bool, typer.Argument(help="false: only calibrate", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder with the training sentences as TSV")],
    corpus: Annotated[Path, typer.Option(help="The sentences that were trained on (.spacy)")],
    dev: Annotated[list[Path], typer.Option(help="Validation texts (.spacy) to calibrate on")],
    lang: Annotated[str, typer.Option(help="Language whose most frequent words' wordpieces are kept")],
    pieces: Annotated[int, typer.Option(help="Number of wordpieces to keep", min=1)],
    bits: Annotated[int, typer.Option(help="Bits per weight: 8 or 16")],
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = -1,
) -> None:
    """Prune the wordpieces that the language does not need, store the weights in 8 or 16 bits, and calibrate."""
    with one_sentence(), replacing(output) as folder:
        nlp = load_pipeline(model, gpu_id)
        if make_slim:
            encoder = nlp.get_pipe("transformer").model
            all_pieces = len(encoder.tokenizer)
            texts, words = training_texts(data, corpus, lang), frequent_words(lang)
            prune(encoder, needed_ids(encoder.tokenizer, texts, words, pieces))
            round_weights(encoder, bits)
            msg.good(f"{len(encoder.tokenizer):,} of {all_pieces:,} wordpieces")
        parts = [list(Corpus(path, gold_preproc=True)(nlp)) for path in dev]
        temperature, before, after = find_temperature(nlp, parts)
        errors = f"{after * 100:.1f} points instead of {before * 100:.1f}"
        msg.good(f"Temperature {temperature}; calibration error on the validation texts {errors}")
        nlp.to_disk(folder)
        sizes = [(path / "transformer" / "model").stat().st_size / 1e6 for path in (model, folder)]
        msg.good(f"{output}: {sizes[1]:,.0f} MB; {model}: {sizes[0]:,.0f} MB")


if __name__ == "__main__":
    typer.run(main)
