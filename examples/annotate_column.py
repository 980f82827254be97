"""Add a column `entities` to a CSV or JSONL file: annotate_column.py news.csv annotated.jsonl --column body."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import spacy
import typer
from spacy.tokens import Doc
from spacy.util import minibatch
from tqdm import tqdm

FORMATS = {".csv": "CSV with all of the header's columns", ".jsonl": "one JSON object a line"}
MAX_CHARACTERS = 1_000_000  # spaCy's nlp.max_length
to_json = json.JSONEncoder(ensure_ascii=False).encode


def read_rows(path: Path, column: str, separator: str) -> Iterator[dict]:
    """Yield one dict per row. Exit at the first bad row with a sentence that names its line."""
    number, is_csv = 0, path.suffix == ".csv"

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf8")

    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(lines(), delimiter=separator, strict=True)
    try:
        if is_csv and column not in (table.fieldnames or []):
            raise ValueError(f"there is no column {column!r} (see --column)")
        for row in table if is_csv else map(json.loads, filter(str.strip, lines())):
            if is_csv and (None in row or None in row.values() or len(row) < len(table.fieldnames)):
                raise ValueError("a field is missing or left over, or two columns have the same name")
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise ValueError(f"there is no text in the column {column!r} (see --column)")
            if "entities" in row:
                raise ValueError("there is already a column 'entities'")
            if len(row[column]) > MAX_CHARACTERS:
                raise ValueError(f"the text has more than {MAX_CHARACTERS:,} characters")
            to_json(row).encode()  # raises UnicodeEncodeError for lone surrogates
            yield row
    except (ValueError, RecursionError, csv.Error) as error:
        sys.exit(f"{path}, line {number}: {error}; expected {FORMATS[path.suffix]}, in UTF-8; correct it.")


def entities_of(doc: Doc) -> list[dict]:
    """Return the entities with their offsets in characters."""
    keys = ("text", "label", "start", "end", "score")
    values = ((e.text, e.label_, e.start_char, e.end_char, getattr(e._, "panx_score", None)) for e in doc.ents)
    return [dict(zip(keys, entity, strict=True)) for entity in values]


def annotate(source: Path, target: Path, column: str = "text", model: str = "it_panx_xlmr") -> None:
    """Write the rows of SOURCE, each with the entities in its COLUMN, to TARGET; both are .csv or .jsonl files."""
    if not {source.suffix, target.suffix} <= FORMATS.keys():
        sys.exit(f"{source}, {target}: both names must end in .csv or .jsonl; rename the other file.")
    with source.open("rb") as file:
        header = file.readline().decode("utf-8-sig", "replace") if source.suffix == ".csv" else ""
    separator = max(",;\t", key=header.count)
    count, columns = 0, {}
    for row in read_rows(source, column, separator):  # check all rows before the slow part
        count, columns = count + 1, columns | dict.fromkeys(row)
    if not count:  # a CSV may have a header alone
        columns = dict.fromkeys(next(csv.reader([header], delimiter=separator), []))
    nlp, partial = spacy.load(model), target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf8", newline="") as file, tqdm(total=count, disable=None) as progress:
            table = csv.DictWriter(file, [*columns, "entities"], delimiter=separator)
            if target.suffix == ".csv":
                table.writeheader()
            for batch in minibatch(read_rows(source, column, separator), 256):
                with nlp.memory_zone():
                    for doc, row in nlp.pipe(((row[column], row) for row in batch), as_tuples=True):
                        row["entities"] = entities_of(doc)
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
    except OSError as error:  # no such file or package, a full disk
        sys.exit(f"{error}; nothing was written: correct it and run the command again.")
