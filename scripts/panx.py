"""PAN-X's format: TSV files, tags, digests, the model card's subset, and spaces between tokens."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy

from scripts.common import UserError

Item = TypeVar("Item")

SPLITS = ("train", "validation", "test")
ENTITY_LABELS = ("LOC", "ORG", "PER")
TAGS = ("O", *(f"{prefix}-{label}" for label in ENTITY_LABELS for prefix in "BI"))

CLOSING = frozenset(")]},;:.!?%…»”") | {"...", "]]"}
OPENING = frozenset("([{«“¿¡") | {"[[", "``"}
CLITICS = frozenset({"n't", "'s", "'re", "'m", "'ll", "'ve", "'d"})
QUOTES = ('"', "'", "''", "'''")


@dataclass(frozen=True)
class Sentence:
    """A sentence of PAN-X; `words` and `tags` (IOB2 strings) have the same length."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def split_path(folder: Path, split: str, lang: str) -> Path:
    """Return the split's TSV file in a folder: `train-it.tsv`, as in PAN-X's processed files, or `train.tsv`.

    Raises UserError if the folder has neither.
    """
    names = (f"{split}-{lang}.tsv", f"{split}.tsv")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} has neither {names[0]} nor {names[1]}; give a folder with all three splits "
        f"({', '.join(SPLITS)}) as token<TAB>tag files."
    )


def read_blocks(path: Path) -> list[list[tuple[str, str]]]:
    """Return the blocks of a UTF-8 file that blank lines separate, each a list of ("FILE, line NUMBER", line).

    Raises UserError, with file and line, for bytes that are not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise UserError(f"{path}, line {number}: not UTF-8 (byte {byte:#04x}); save it as UTF-8.") from None
    blocks: list[list[tuple[str, str]]] = [[]]
    # not str.splitlines, which would cut inside tokens that contain U+2028 or U+0085
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip(" \r"):
            blocks[-1].append((f"{path}, line {number}", line.removesuffix("\r")))
        else:
            blocks.append([])
    return [block for block in blocks if block]


def read_tsv(path: Path) -> list[Sentence]:
    """Read `token<TAB>tag` lines; blank lines separate sentences. Tokens stay unchanged, blank ones included.

    Raises UserError, with file and line, for what `read_blocks` refuses, a line without exactly one tab, an unknown
    tag, and a file without sentences.
    """
    sentences = []
    for block in read_blocks(path):
        words, tags = [], []
        for where, line in block:
            if line.count("\t") != 1:
                raise UserError(
                    f"{where}: {line[:40]!r} has {line.count(chr(9))} tabs where token<TAB>tag has one; fix the line."
                )
            word, tag = line.split("\t")
            check_tags([tag], where)
            words.append(word)
            tags.append(tag)
        sentences.append(Sentence(tuple(words), tuple(tags)))
    if not sentences:
        raise UserError(f"{path}: no sentences; expected token<TAB>tag lines.")
    return sentences


def check_tags(tags: Iterable[str], where: str) -> None:
    """Raise UserError, beginning with `where`, for the first tag outside IOB2 over PER, ORG and LOC."""
    for tag in tags:
        if tag not in TAGS:
            raise UserError(f"{where}: unknown tag {tag!r}; expected IOB2 tags: {', '.join(TAGS)}.")


def to_tsv(sentences: Sequence[Sentence]) -> bytes:
    """Return the sentences as UTF-8 `token<TAB>tag` lines with a blank line between sentences."""
    lines = ("".join(f"{word}\t{tag}\n" for word, tag in zip(s.words, s.tags, strict=True)) for s in sentences)
    return "\n".join(lines).encode("utf8")


def digest(sentences: Sequence[Sentence]) -> str:
    """Return the SHA-256 of the sentences as TSV, which is the same whatever file format they came from."""
    return hashlib.sha256(to_tsv(sentences)).hexdigest()


def subset(sentences: Sequence[Item], size: int, name: str) -> list[Item]:
    """Return the sentences that the model card's `shuffle(seed=0).select(range(size))` selects; all, in order, for 0.

    datasets.Dataset.shuffle(seed) permutes with `numpy.random.default_rng(seed)`. Raises UserError, naming the split
    as `name`, if `size` is negative or above the number of sentences.
    """
    if not 0 <= size <= len(sentences):
        raise UserError(f"{name}: {len(sentences)} sentences, {size} asked for; set a size up to that, or 0 for all.")
    if size == 0:
        return list(sentences)
    return [sentences[i] for i in numpy.random.default_rng(0).permutation(len(sentences))[:size]]


def guess_spaces(words: Sequence[str]) -> list[bool]:
    """Return for each token whether a space follows it, as in `(1984)`, `Milano, Roma` or `''città''`.

    Quotes are paired in order: the first of a pair joins the next token, the second the previous one. Quotes that PAN-X
    glues to a word (`''città`) count. A single quote opens at the start of a sentence and closes elsewhere.
    """
    joins_next = [word in OPENING for word in words]
    joins_previous = [word in CLOSING or word in CLITICS for word in words]
    for quote in QUOTES:
        is_open = False
        for i, word in enumerate(words):
            if word == "``" and quote == "''":  # the Penn Treebank opens with `` and closes with ''
                is_open = True
            elif word == quote:
                partner_follows = any(later == quote for later in words[i + 1 :])
                is_open = not is_open and (partner_follows or i == 0)
                joins_next[i], joins_previous[i] = is_open, not is_open
            elif word.startswith(quote) and word.strip("'\""):
                # 'Bryan' opens; the ' of '6-4 closes an open quote and is no part of the score
                joins_previous[i] = joins_previous[i] or (is_open and quote == "'" and word[1].isdigit())
                is_open = not is_open and not word.endswith(quote)
    spaces = [not (joins_next[i] or joins_previous[i + 1]) for i in range(len(words) - 1)]
    return [*spaces, False]
