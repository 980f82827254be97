"""Converts PAN-X's splits from TSV to spaCy's DocBin, and writes what is in them to stats.json."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy
import spacy
import srsly
import typer
from spacy.tokens import Doc, DocBin
from spacy.vocab import Vocab
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.panx import SPLITS, Sentence, guess_spaces, read_tsv, split_path, subset

FILE_NAMES = {"train": "train.spacy", "validation": "dev.spacy", "test": "test.spacy"}


def repair(sentence: Sentence) -> tuple[Sentence, Counter[str]]:
    """Drops blank tokens and turns each I- tag that continues no entity of its label into a B-.

    Returns the sentence, which may be left without a token, and how many repairs of each kind were made.
    """
    repairs: Counter[str] = Counter()
    words, tags = [], []
    for word, tag in zip(sentence.words, sentence.tags, strict=True):
        if not word.strip():
            repairs["blank token dropped"] += 1
            continue
        if tag.startswith("I-") and (not tags or tags[-1][2:] != tag[2:]):
            repairs["I- without its B- made a B-"] += 1
            tag = "B-" + tag[2:]
        words.append(word)
        tags.append(tag)
    return Sentence(tuple(words), tuple(tags)), repairs


def make_doc(vocab: Vocab, sentence: Sentence) -> Doc:
    """The sentence as a Doc: PAN-X's tokens as they are, spaces as a person would write them, entities annotated."""
    return Doc(vocab, words=sentence.words, spaces=guess_spaces(sentence.words), ents=sentence.tags)


def convert_split(sentences: Iterable[Sentence], vocab: Vocab, name: str) -> tuple[list[Doc], Counter[str]]:
    """The sentences as Docs, repaired; those that have no token left are dropped and counted among the repairs.

    Raises UserError where no sentence is left of the split called `name`.
    """
    docs, repairs = [], Counter()
    for sentence in tqdm(sentences, desc=name, unit=" sentences", leave=False, disable=None):
        whole, made = repair(sentence)
        repairs.update(made)
        if whole.words:
            docs.append(make_doc(vocab, whole))
        else:
            repairs["sentence without tokens dropped"] += 1
    if not docs:
        raise UserError(f"{name}: every token of the split is blank; give sentences with words in them.")
    return docs, repairs


def length_distribution(lengths: Sequence[int]) -> dict[str, float]:
    """Smallest, median, mean, 95th and 99th percentile, and largest of the lengths."""
    median, p95, p99 = (float(x) for x in numpy.percentile(lengths, [50, 95, 99]))
    mean = round(float(numpy.mean(lengths)), 2)
    return {"min": min(lengths), "median": median, "mean": mean, "p95": p95, "p99": p99, "max": max(lengths)}


def split_stats(docs: Sequence[Doc], repairs: Counter[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What is in a split: counts, lengths in tokens and in the encoder's wordpieces without special tokens, repairs."""
    wordpieces = tokenizer([doc.text for doc in docs], add_special_tokens=False, verbose=False)["input_ids"]
    return {
        "sentences": len(docs),
        "tokens": sum(len(doc) for doc in docs),
        "entities": dict(sorted(Counter(ent.label_ for doc in docs for ent in doc.ents).items())),
        "length_in_tokens": length_distribution([len(doc) for doc in docs]),
        "length_in_wordpieces": length_distribution([len(ids) for ids in wordpieces]),
        "duplicate_sentences": len(docs) - len({_words(doc) for doc in docs}),
        "repairs": dict(sorted(repairs.items())),
    }


def shared_sentences(splits: dict[str, Sequence[Doc]]) -> dict[str, int]:
    """For each pair of splits, how many sentences of the later one have the same words as one of the earlier one."""
    names = list(splits)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    known = {name: {_words(doc) for doc in docs} for name, docs in splits.items()}
    return {f"{b} also in {a}": sum(_words(doc) in known[a] for doc in splits[b]) for a, b in pairs}


def _words(doc: Doc) -> tuple[str, ...]:
    return tuple(token.text for token in doc)


def convert(
    data: Path, output: Path, lang: str, encoder: Path, sizes: dict[str, int], extra_train: Path | None = None
) -> dict[str, Any]:
    """Writes {train,dev,test}.spacy and stats.json into `output` and returns the stats.

    sizes: how many sentences of each split, picked as the model card picked them, 0 for all. extra_train: a folder of
    TSV files, of each of which as many sentences are added to the training split. Nothing is written unless all splits
    can be. Raises UserError for what panx.read_tsv and panx.subset refuse.
    """
    vocab = spacy.blank(lang).vocab
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    splits, stats = {}, {}
    for split in SPLITS:
        path = split_path(data, split, lang)
        sentences = subset(read_tsv(path), sizes[split], f"{path} ({split})")
        for extra in sorted(extra_train.glob("*.tsv")) if extra_train and split == "train" else []:
            sentences += subset(read_tsv(extra), sizes[split], str(extra))
        splits[split], repairs = convert_split(sentences, vocab, f"{path} ({split})")
        stats[split] = split_stats(splits[split], repairs, tokenizer)
    stats["shared"] = shared_sentences(splits)
    for split, docs in splits.items():
        with replacing(output / FILE_NAMES[split]) as path:
            path.write_bytes(DocBin(attrs=["ENT_IOB", "ENT_TYPE", "SPACY"], docs=docs).to_bytes())
    with replacing(output / "stats.json") as path:
        srsly.write_json(path, stats)
    return stats


def main(
    data: Annotated[Path, typer.Argument(help="Folder with the three splits as TSV", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for the .spacy files and stats.json", show_default=False)],
    lang: Annotated[str, typer.Option(help="spaCy's code of the language")] = "it",
    encoder: Annotated[Path, typer.Option(help="Folder of the encoder whose wordpieces are counted")] = Path(
        "assets/encoder"
    ),
    train_size: Annotated[int, typer.Option(help="Training sentences, 0 for all")] = 0,
    dev_size: Annotated[int, typer.Option(help="Validation sentences, 0 for all")] = 0,
    test_size: Annotated[int, typer.Option(help="Test sentences, 0 for all")] = 0,
    extra_train: Annotated[Path | None, typer.Option(help="Folder of further training sentences as TSV")] = None,
) -> None:
    """Convert PAN-X's splits to DocBin, repaired where they must be, and count what is in them."""
    with one_sentence():
        sizes = {"train": train_size, "validation": dev_size, "test": test_size}
        stats = convert(data, output, lang, encoder, sizes, extra_train)
        for split in SPLITS:
            row = stats[split]
            entities = ", ".join(f"{count} {label}" for label, count in row["entities"].items())
            repairs = ", ".join(f"{count} × {kind}" for kind, count in row["repairs"].items()) or "none"
            path = output / FILE_NAMES[split]
            msg.good(f"{path}: {row['sentences']} sentences, {row['tokens']} tokens, {entities}; repairs: {repairs}")


if __name__ == "__main__":
    typer.run(main)
