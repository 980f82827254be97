"""The running corpus: Italian text written for this project, one sentence per line, entities as `[PER Grazia Deledda]`.

A blank line ends a document. docs/annotation.md says what is annotated. The command counts what is in the corpus.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import srsly
import typer
from spacy.language import Language
from spacy.tokens import Doc
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.panx import ENTITY_LABELS, SPLITS, read_blocks
from scripts.pipeline import blank_pipeline

LANG = "it"
ENTITY = re.compile(rf"\[({'|'.join(ENTITY_LABELS)}) ([^\[\]]+)\]")
PARAGRAPH = 5  # a document of this many sentences or more becomes one Doc, so that a pipeline learns to read paragraphs


@dataclass(frozen=True)
class Line:
    """A sentence, its entities as (first character, character after the last, label), and its file and line."""

    text: str
    entities: tuple[tuple[int, int, str], ...]
    where: str


def read_documents(path: Path) -> list[list[Line]]:
    """Read the documents of one file. Raises UserError, with file and line, as read_blocks and parse_line do."""
    return [[parse_line(line.strip(), where) for where, line in block] for block in read_blocks(path)]


def parse_line(raw: str, where: str) -> Line:
    """Parse a sentence with entities in brackets. Raises UserError, beginning with `where`, for another bracket."""
    text, entities, end = "", [], 0
    for match in ENTITY.finditer(raw):
        text += raw[end : match.start()]
        entities.append((len(text), len(text) + len(match[2]), match[1]))
        text += match[2]
        end = match.end()
    text += raw[end:]
    if bracket := re.search(r"[\[\]]", text):
        raise UserError(
            f"{where}: unexpected bracket at {text[bracket.start() :][:30]!r}; expected "
            f"[LABEL text] with one of {', '.join(ENTITY_LABELS)}: fix the line."
        )
    return Line(text, tuple(entities), where)


def make_doc(nlp: Language, lines: Sequence[Line]) -> Doc:
    """Return the lines as one Doc. Raises UserError for an entity that begins or ends inside a token."""
    doc = nlp.make_doc("\n".join(line.text for line in lines))
    spans, start = [], 0
    for line in lines:
        for first, last, label in line.entities:
            span = doc.char_span(start + first, start + last, label=label)
            if span is None:
                raise UserError(
                    f"{line.where}: {line.text[first:last]!r} begins or ends inside a token; expected whole tokens: "
                    "move the bracket."
                )
            spans.append(span)
        start += len(line.text) + 1
    doc.set_ents(spans)
    return doc


def load(folder: Path) -> dict[str, list[list[Line]]]:
    """Read every .txt file of the folder and split the documents 80/10/10 into train, validation and test.

    Raises UserError for fewer than ten documents.
    """
    documents = [document for path in sorted(folder.glob("*.txt")) for document in read_documents(path)]
    if len(documents) < 10:
        raise UserError(
            f"{folder}: documents in its .txt files: {len(documents)}, expected at least ten, of which the ninth is "
            "for validation and the tenth for testing; add some, with a blank line after each, or name another folder."
        )
    parts: dict[str, list[list[Line]]] = {split: [] for split in SPLITS}
    for number, document in enumerate(documents):
        parts[SPLITS[max(number % 10 - 7, 0)]].append(document)
    return parts


def make_docs(nlp: Language, documents: Sequence[Sequence[Line]]) -> list[Doc]:
    """Return a Doc per sentence, and one for all sentences of a document that has PARAGRAPH or more."""
    groups = [
        group for some in documents for group in ([some] if len(some) >= PARAGRAPH else [[line] for line in some])
    ]
    return [make_doc(nlp, group) for group in groups]


def count(folder: Path) -> dict[str, Any]:
    """Count sentences, entities, lengths and repeated names, in all and by file and split."""
    parts = load(folder)
    lines = {split: [line for document in documents for line in document] for split, documents in parts.items()}
    every = [line for some in lines.values() for line in some]
    files = {path.stem: read_documents(path) for path in sorted(folder.glob("*.txt"))}
    kinds = {kind: [line for document in documents for line in document] for kind, documents in files.items()}
    train_names, test_names = {*_names(lines["train"])}, _names(lines["test"])
    new_names = sum(name not in train_names for name in test_names) / max(len(test_names), 1)
    return {
        "all": _counts(every) | {"documents": sum(map(len, parts.values()))},
        "kinds": {
            kind: _counts(some) | {"share": round(len(some) / len(every), 4)} for kind, some in kinds.items() if some
        },
        "splits": {split: _counts(some) | {"documents": len(parts[split])} for split, some in lines.items()},
        "test_names_not_in_train": round(new_names, 4),
        "names_used_most": dict(Counter(_names(every)).most_common(20)),
    }


def agreement(folder: Path, second: Path) -> float:
    """Return the F1 of the entities of the test part against those of a second annotation of the same sentences.

    Raises UserError if the sentences differ.
    """
    first = [line for document in load(folder)["test"] for line in document]
    other = [line for document in read_documents(second) for line in document]
    if [line.text for line in first] != [line.text for line in other]:
        raise UserError(f"{second}: expected the sentences of the test part in the same order; correct the file.")
    both = sum(len({*one.entities} & {*two.entities}) for one, two in zip(first, other, strict=True))
    return 2 * both / max(sum(len(line.entities) for line in (*first, *other)), 1)


def _names(lines: Sequence[Line]) -> list[str]:
    return [line.text[start:end] for line in lines for start, end, _ in line.entities]


def _counts(lines: Sequence[Line]) -> dict[str, Any]:
    labels = Counter(label for line in lines for _, _, label in line.entities)
    lengths = [len(line.text.split()) for line in lines]
    elided = sum(line.text[:a].endswith(("'", "’")) for line in lines for a, _, _ in line.entities)
    return {
        "sentences": len(lines),
        "entities": dict(sorted(labels.items())),
        "without_entity": round(sum(not line.entities for line in lines) / len(lines), 4),
        "after_an_elision": round(elided / max(labels.total(), 1), 4),
        "words": {"median": float(median(lengths)), "mean": round(fmean(lengths), 2), "max": max(lengths)},
    }


@one_sentence()
def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the corpus")] = Path("corpus/running"),
    second: Annotated[Path | None, typer.Option(help="Second annotation of the test part, to compare")] = None,
) -> None:
    """Check the running corpus and count what is in it into FOLDER/stats.json."""
    nlp = blank_pipeline(LANG)
    for documents in load(folder).values():
        make_docs(nlp, documents)
    stats = count(folder)
    with replacing(folder / "stats.json") as path:
        srsly.write_json(path, stats)
    whole = stats["all"]
    msg.good(
        f"{folder}: {whole['sentences']} sentences in {whole['documents']} documents, "
        f"{whole['without_entity'] * 100:.1f} % without an entity; "
        f"{stats['test_names_not_in_train'] * 100:.1f} % of the test's names are not in the training part"
    )
    if second:
        msg.good(f"{second}: agreement F1 {agreement(folder, second) * 100:.2f}")


if __name__ == "__main__":
    typer.run(main)
