"""Annotates a unit of rows and writes its files: the annotated rows (Parquet), the bad ones and why (JSONL)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import srsly
from spacy.language import Language
from spacy.tokens import Doc, Span

from scripts.annotate.units import Unit, is_utf8, read
from scripts.common import replacing

ENTITY = {"start": pyarrow.int32(), "end": pyarrow.int32(), "label": pyarrow.string(), "score": pyarrow.float32()}
SCHEMA = pyarrow.schema(
    {
        "file": pyarrow.string(),
        "row": pyarrow.int64(),
        "text": pyarrow.string(),
        "entities": pyarrow.list_(pyarrow.struct(ENTITY)),
    }
)
HELD = 4_000_000  # characters of texts that are held before they are written


def part_path(output: Path, unit: Unit) -> Path:
    """The file of a unit's annotated rows: a unit whose file is there is done."""
    return output / f"part-{unit.file:06}-{unit.first:012}.parquet"


def bad_path(output: Path, unit: Unit) -> Path:
    """The file of a unit's bad rows; readers of Parquet folders pass over names that begin with `_`."""
    return output / "_bad" / f"{part_path(output, unit).stem}.jsonl"


def reason_against(value: Any, max_chars: int) -> str:
    """Why a value is no text to annotate; "" if it is."""
    if value is None:
        return "null"
    if not isinstance(value, str):
        return f"not a string: {type(value).__name__}"
    if len(value) > max_chars:
        return f"too long: {len(value):,} characters"
    return "" if is_utf8(value) else "not valid Unicode"


def entities(doc: Doc) -> list[dict[str, Any]]:
    """The entities, character offsets in the text; `score` is None where the pipe that set the entity gives none."""
    scored = Span.has_extension("score")
    return [
        {"start": e.start_char, "end": e.end_char, "label": e.label_, "score": e._.panx_score if scored else None}
        for e in doc.ents
    ]


def annotate_texts(nlp: Language, texts: Sequence[str]) -> list[list[dict[str, Any]] | str]:
    """Each text's entities, or the reason why the pipeline fails on this text. Raises what it raises on any text."""
    try:
        with nlp.memory_zone():  # or the vocabulary would grow with every new word
            return [entities(doc) for doc in nlp.pipe(texts)]
    except Exception:
        return [_annotate_alone(nlp, text) for text in texts]


def _annotate_alone(nlp: Language, text: str) -> list[dict[str, Any]] | str:
    try:
        return entities(nlp(text))
    except Exception as error:
        nlp("Una prova.")  # raises where it is not the text: no memory, a broken GPU
        return f"the pipeline fails: {type(error).__name__}: {error}"


def annotate_unit(
    nlp: Language, source: Path, name: str, column: str, max_chars: int, unit: Unit, output: Path
) -> None:
    """Writes a unit's files, the bad rows' first. `name` is what the rows say of their file.

    Raises what `read` does, OSError, and what the pipeline raises on any text.
    """
    bad: list[dict[str, Any]] = []
    held: list[tuple[int, str]] = []

    def refuse(row: int, reason: str) -> None:
        bad.append({"file": name, "row": row, "reason": reason})

    def flush(writer: pyarrow.parquet.ParquetWriter) -> None:
        good = []
        for (row, text), found in zip(held, annotate_texts(nlp, [text for _, text in held]), strict=True):
            if isinstance(found, str):
                refuse(row, found)
            else:
                good.append({"file": name, "row": row, "text": text, "entities": found})
        writer.write_table(pyarrow.Table.from_pylist(good, schema=SCHEMA))
        held.clear()

    with replacing(part_path(output, unit)) as temporary:
        with pyarrow.parquet.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            characters = 0
            for row, (value, reason) in enumerate(read(source, column, unit), unit.first):
                if reason := reason or reason_against(value, max_chars):
                    refuse(row, reason)
                    continue
                held.append((row, value))
                characters += len(value)
                if characters > HELD:
                    flush(writer)
                    characters = 0
            flush(writer)
        bad_path(output, unit).unlink(missing_ok=True)
        if bad:
            with replacing(bad_path(output, unit)) as file:
                srsly.write_jsonl(file, sorted(bad, key=lambda row: row["row"]))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # after a power cut, no name without its content
