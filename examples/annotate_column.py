"""Adds `entities` to the rows of a CSV or JSONL file: annotate_column.py news.csv annotated.jsonl --column body."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import spacy
import typer
from spacy.util import minibatch
from tqdm import tqdm

SHAPES = {".csv": "CSV with all of the header's columns", ".jsonl": "one JSON object a line"}
ENTITY = ("text", "label", "start", "end", "score")  # start and end in characters, score is a probability
to_json = json.JSONEncoder(ensure_ascii=False).encode


def rows(path: Path, column: str, separator: str) -> Iterator[dict]:
    """One row after the other. Exits at the first bad one, with a sentence that names its line."""
    number, is_csv = 0, path.suffix == ".csv"

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf8")

    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(lines(), delimiter=separator, strict=True)
    try:
        for row in table if is_csv else map(json.loads, filter(str.strip, lines())):
            if is_csv and (None in row or None in row.values() or len(row) < len(table.fieldnames)):
                raise ValueError("a field too many or too few, or two columns of one name")
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise ValueError(f"no text in {column!r}, the column that --column names")
            if len(row[column]) > 1_000_000 or "entities" in row:
                raise ValueError("over 1,000,000 characters, spaCy's nlp.max_length, or a column 'entities' before")
            to_json(row).encode()  # half a surrogate pair could not be written
            yield row
    except (ValueError, RecursionError, csv.Error) as error:
        sys.exit(f"{path}, line {number}: {error}; expected {SHAPES[path.suffix]}, in UTF-8; mend it.")


def annotate(source: Path, target: Path, column: str = "text", model: str = "it_panx_xlmr") -> None:
    """Write the rows of SOURCE, each with the entities in its COLUMN, to TARGET; both are .csv or .jsonl files."""
    if not {source.suffix, target.suffix} <= SHAPES.keys():
        sys.exit(f"{source}, {target}: expected two names that end in .csv or .jsonl; rename the one that does not.")
    with source.open("rb") as file:
        header = file.readline().decode("utf8", "replace") if source.suffix == ".csv" else ""
    separator, count, fields = max(",;\t", key=header.count), 0, {}
    for row in rows(source, column, separator):  # all of them, so that a bad one is not found after hours
        count, fields = count + 1, fields | dict.fromkeys(row)
    nlp, partial = spacy.load(model), target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf8", newline="") as file, tqdm(total=count, disable=None) as progress:
            table = csv.DictWriter(file, [*fields, "entities"], delimiter=separator)
            if target.suffix == ".csv":
                table.writeheader()
            for batch in minibatch(rows(source, column, separator), 256):
                with nlp.memory_zone():  # the vocabulary forgets the batch's words after it
                    for doc, row in nlp.pipe(((row[column], row) for row in batch), as_tuples=True):
                        found = [(e.text, e.label_, e.start_char, e.end_char, e._.panx_score) for e in doc.ents]
                        row["entities"] = [dict(zip(ENTITY, values, strict=True)) for values in found]
                        if target.suffix == ".csv":
                            table.writerow({k: v if isinstance(v, str | None) else to_json(v) for k, v in row.items()})
                        else:
                            file.write(to_json(row) + "\n")
                        progress.update()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        typer.run(annotate)
    except OSError as error:  # no such file or pipeline, a full disk
        sys.exit(f"{error} (nothing was written; put that right and run it again)")
