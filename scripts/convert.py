"""Convert PAN-X's splits and the running corpus to DocBin, and count what is in them.

From a TSV line to the gradient: `read_tsv` reads words and tags; `repair` makes them valid; `guess_spaces` puts spaces
between words; `make_training_doc` cuts training words where a tokenizer cuts a text; DocBin stores tokens and entities;
`spacy train` reads them as gold tokens; the pipe `ner` computes the loss (scripts/pipeline/token_ner.py).
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy
import srsly
import typer
from spacy.language import Language
from spacy.tokens import Doc, DocBin
from spacy.vocab import Vocab
from tqdm import tqdm
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.panx import SPLITS, Sentence, guess_spaces, read_tsv, split_path, subset
from scripts.pipeline import blank_pipeline
from scripts.running import LANG, load, make_docs

FILE_NAMES = {"train": "train.spacy", "validation": "dev.spacy", "test": "test.spacy"}
RUNNING_NAMES = {"validation": "running-dev.spacy", "test": "running-test.spacy"}


def repair(sentence: Sentence) -> tuple[Sentence, Counter[str]]:
    """Drop blank tokens and turn each I- tag that continues no entity of its label into a B-.

    Returns the sentence, which may have no token left, and the number of repairs of each kind.
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
    """Return the sentence as a Doc with PAN-X's tokens, spaces as a person would write them, and its entities."""
    return Doc(vocab, words=sentence.words, spaces=guess_spaces(sentence.words), ents=sentence.tags)


def make_training_doc(nlp: Language, sentence: Sentence) -> Doc:
    """Return the Doc of a training sentence, its words cut where the tokenizer cuts a text.

    Opening quotes are cut off (`''Strada`): PAN-X glues them mostly to non-entities, a cue that real text lacks. Elided
    words are cut off (`dell'Italia`), so that the name has a vector.
    """
    words, spaces, tags = [], [], []
    for word, space, tag in zip(sentence.words, guess_spaces(sentence.words), sentence.tags, strict=True):
        quotes = re.match(r"('{2,}(?=[^']))?", word).group()
        parts = cut_elisions(nlp, word.removeprefix(quotes))
        words += [quotes, *parts] if quotes else parts
        spaces += [False] * (len(parts) - 1 + bool(quotes)) + [space]
        if quotes:
            tags.append(tag if tag[0] == "I" else "O")
        tags += part_tags(parts, tag)
    return Doc(nlp.vocab, words=words, spaces=spaces, ents=tags)


def cut_elisions(nlp: Language, word: str) -> list[str]:
    """Cut a word after each elision at which the tokenizer cuts: `dell'Italia` into `dell'` and `Italia`."""
    if not re.search(r"\w['’]\w", word):
        return [word]
    parts = [""]
    for token in nlp.tokenizer(word):
        elided = re.search(r"\w['’]$", parts[-1]) and token.text[0].isalnum()
        if elided:
            parts.append("")
        parts[-1] += token.text_with_ws
    return parts


def part_tags(parts: Sequence[str], tag: str) -> list[str | None]:
    """Return the tags of a word's parts; None if the tag is unknown, which training ignores.

    After an elided word in lower case the name begins (`dell'` O, `Italia` B-LOC). A capital one belongs to the name
    (`L'` B-LOC, `Aquila` I-LOC). PAN-X calls `dell'Italia` O for the whole word: a capital part of it is unknown.
    """
    inside = "I" + tag[1:]
    if tag == "O":
        return ["O", *(None if part[0].isupper() else "O" for part in parts[1:])]
    if tag[0] == "B" and len(parts) > 1 and parts[0][0].islower():
        return ["O", tag, *[inside] * (len(parts) - 2)]
    return [tag, *[inside] * (len(parts) - 1)]


def convert_split(
    sentences: Iterable[Sentence], name: str, to_doc: Callable[[Sentence], Doc]
) -> tuple[list[Doc], Counter[str]]:
    """Return the repaired sentences as Docs and the number of repairs of each kind; drop sentences without a token.

    Raises UserError if the split `name` has no sentence left.
    """
    docs, repairs = [], Counter()
    for sentence in tqdm(sentences, desc=name, unit=" sentences", leave=False, disable=None):
        whole, made = repair(sentence)
        repairs.update(made)
        if whole.words:
            docs.append(to_doc(whole))
        else:
            repairs["sentence without tokens dropped"] += 1
    if not docs:
        raise UserError(f"{name}: every token of the split is blank; give sentences with words in them.")
    return docs, repairs


def split_stats(docs: Sequence[Doc], repairs: Counter[str]) -> dict[str, Any]:
    """Count sentences, tokens, entities, lengths, duplicates and repairs."""
    lengths = [len(doc) for doc in docs]
    median, p95, p99 = numpy.percentile(lengths, [50, 95, 99]).tolist()
    spread = {"min": min(lengths), "median": median, "mean": round(sum(lengths) / len(docs), 2), "p95": p95, "p99": p99}
    return {
        "sentences": len(docs),
        "tokens": sum(lengths),
        "entities": dict(sorted(Counter(ent.label_ for doc in docs for ent in doc.ents).items())),
        "length_in_tokens": spread | {"max": max(lengths)},
        "duplicate_sentences": len(docs) - len({doc.text for doc in docs}),
        "repairs": dict(sorted(repairs.items())),
    }


@one_sentence()
def main(
    data: Annotated[Path, typer.Argument(help="Folder with the three splits as TSV", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for the .spacy files and stats.json", show_default=False)],
    lang: Annotated[str, typer.Option(help="spaCy's code of the language")] = "it",
    train_size: Annotated[int, typer.Option(help="Training sentences, 0 for all")] = 0,
    dev_size: Annotated[int, typer.Option(help="Validation sentences, 0 for all")] = 0,
    test_size: Annotated[int, typer.Option(help="Test sentences, 0 for all")] = 0,
    extra_train: Annotated[Path | None, typer.Option(help="Folder of further training sentences as TSV")] = None,
    extra_train_size: Annotated[int, typer.Option(help="Sentences of each, 0 for as many as train_size", min=0)] = 0,
    running: Annotated[Path | None, typer.Option(help="Folder of the running corpus, used for Italian")] = None,
    running_times: Annotated[int, typer.Option(help="How often its training part is taken", min=0)] = 0,
) -> dict[str, Any]:
    """Convert PAN-X and the running corpus to DocBin, count what is in them, and return the counts.

    Further training sentences that are also validation or test sentences are left out. Without the running corpus, its
    .spacy files are empty. Nothing is written unless everything can be.
    """
    nlp = blank_pipeline(lang)
    splits, stats, known = {}, {}, {}
    for split, size in zip(SPLITS, (train_size, dev_size, test_size), strict=True):
        path = split_path(data, split, lang)
        sentences = subset(read_tsv(path), size, f"{path} ({split})")
        if split == "train":
            # other languages have some of the same titles
            held_out = {s.words for name in SPLITS[1:] for s in read_tsv(split_path(data, name, lang))}
            for extra in sorted(extra_train.glob("*.tsv")) if extra_train else []:
                more = [sentence for sentence in read_tsv(extra) if sentence.words not in held_out]
                sentences += subset(more, min(extra_train_size or train_size, len(more)), str(extra))
            to_doc = partial(make_training_doc, nlp)
        else:
            to_doc = partial(make_doc, nlp.vocab)
        splits[split], repairs = convert_split(sentences, f"{path} ({split})", to_doc)
        stats[split] = split_stats(splits[split], repairs)
        known[split] = {doc.text for doc in splits[split]}
    stats["shared"] = {
        f"{b} also in {a}": sum(doc.text in known[a] for doc in splits[b]) for a, b in itertools.combinations(SPLITS, 2)
    }
    parts: dict[str, list[Doc]] = {}
    if running and lang == LANG:
        parts = {split: make_docs(nlp, documents) for split, documents in load(running).items()}
        stats["running"] = {split: split_stats(docs, Counter()) for split, docs in parts.items()}
        stats["running"]["times"] = running_times
        splits["train"] += parts["train"] * running_times
    files = {FILE_NAMES[split]: docs for split, docs in splits.items()}
    files |= {name: parts.get(split, []) for split, name in RUNNING_NAMES.items()}
    for name, docs in files.items():
        with replacing(output / name) as path:
            path.write_bytes(DocBin(attrs=["ENT_IOB", "ENT_TYPE", "SPACY"], docs=docs).to_bytes())
    with replacing(output / "stats.json") as path:
        srsly.write_json(path, stats)
    for split in SPLITS:
        row = stats[split]
        entities = ", ".join(f"{count} {label}" for label, count in row["entities"].items())
        repairs = ", ".join(f"{count} × {kind}" for kind, count in row["repairs"].items()) or "none"
        path = output / FILE_NAMES[split]
        msg.good(f"{path}: {row['sentences']} sentences, {row['tokens']} tokens, {entities}; repairs: {repairs}")
    if parts and running_times:
        msg.good(f"Running corpus: {len(parts['train'])} training texts, each taken {running_times} times")
    return stats


if __name__ == "__main__":
    typer.run(main)
