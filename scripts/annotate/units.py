"""Read Parquet, CSV and JSONL files row by row and cut them into units of consecutive rows."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from wasabi import msg

from scripts.common import UserError

SURROGATE = re.compile("[\ud800-\udfff]")  # stands for a byte that is not UTF-8
STRINGS = (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null())
UNIT_CHARS = 4_000_000  # a unit with more characters ends before it has `unit_rows` rows
# characters of a CSV cell, bytes of a JSONL line: an unclosed quote or a file without line breaks must not fill memory
LIMIT = 100_000_000

Row = tuple[str | None, str | None]  # a text, or None and the reason why the row is bad


class Unit(NamedTuple):
    """Consecutive rows of an input file from row number `first` on, and the name of the output file, `part`."""

    part: str
    name: str
    first: int
    rows: list[Row]


def input_files(source: Path, output: Path) -> dict[str, Path]:
    """Return the files to annotate by name: `source`, or those below it that are not hidden. Raises UserError.

    Folders below `source` that this command wrote are left out. Links to folders are not followed.
    """
    if source.is_file():
        found = {source.name: source}
    else:
        below = sorted(source.rglob("*"))
        outputs = {output, *(path.parent for path in below if path.name == "_manifest.json")}
        outputs = {folder for folder in outputs if source in folder.parents}
        paths = [path for path in below if path.is_file() or path.is_symlink()]
        paths = [path for path in paths if outputs.isdisjoint(path.parents)]
        found = {path.relative_to(source).as_posix(): path for path in paths}
        found = {name: path for name, path in found.items() if not re.search("(^|/)[._]", name)}
    files = {name: path for name, path in found.items() if path.suffix in READERS and path.is_file()}
    if not files:
        raise UserError(f"{source}: no {', '.join(READERS)} file; name a folder that has some, or a file.")
    if wrong := [name for name in files if SURROGATE.search(name)]:  # no output could hold the name
        raise UserError(f"{ascii(wrong[0])}: the file's name is not UTF-8; rename it.")
    if skipped := len(found) - len(files):
        msg.warn(f"Skipped {skipped} file(s) that are not {', '.join(READERS)}, or links to folders.")
    return files


def fingerprint(path: Path) -> list[int]:
    """Return a file's size in bytes and its modification time in ns."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def units(files: dict[str, Path], column: str, max_chars: int, unit_rows: int) -> Iterator[Unit]:
    """Yield all rows in units, the same in every run. Raises what `read` does, and UserError if a file changes."""
    for number, (name, path) in enumerate(files.items()):
        before, first, size = fingerprint(path), 0, 0
        rows: list[Row] = []
        for row in read(path, column, max_chars):
            rows.append(row)
            size += len(row[0] or "")
            if len(rows) == unit_rows or size > UNIT_CHARS:
                yield Unit(f"part-{number:06}-{first:012}.parquet", name, first, rows)
                first, size, rows = first + len(rows), 0, []
        if rows:
            yield Unit(f"part-{number:06}-{first:012}.parquet", name, first, rows)
        if fingerprint(path) != before:
            raise UserError(f"{path}: changed while it was read; annotate it into a new folder.")


def read(path: Path, column: str, max_chars: int) -> Iterator[Row]:
    """Yield a file's rows: the lines of JSONL, the records of CSV. Raises UserError if there is no such column."""
    for value, reason in READERS[path.suffix](path, column):
        reason = reason or _reason_against(value, max_chars)
        yield (None, reason) if reason else (value, None)


def _reason_against(value: Any, max_chars: int) -> str:
    if value is None:
        return "null"
    if not isinstance(value, str):
        return f"not a string: {type(value).__name__}"
    if len(value) > max_chars:
        return f"too long: {len(value):,} characters"
    return "not UTF-8" if SURROGATE.search(value) else ""


def _check_column(path: Path, column: str, names: Sequence[str]) -> None:
    if names.count(column) > 1:
        raise UserError(f"{path}: {names.count(column)} columns are called {column!r}; rename all but one.")
    if column not in names:
        columns = ", ".join(map(repr, names[:20])) or "none"
        raise UserError(f"{path}: no column {column!r}; its columns are {columns}; name one with --column.")


def _read_parquet(path: Path, column: str) -> Iterator[tuple[Any, str]]:
    try:
        # a buffer: pages are read as they are needed, not a whole row group at once
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        _check_column(path, column, file.schema_arrow.names)
        kind = file.schema_arrow.field(column).type
        if (kind.value_type if pyarrow.types.is_dictionary(kind) else kind) not in STRINGS:
            raise UserError(f"{path}: the column {column!r} is {kind}, not strings; name another column with --column.")
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():  # Arrow does not check strings
                yield None if value is None else value.decode("utf8", "surrogateescape"), ""
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].removesuffix(".")
        raise UserError(f"{path}: not a whole Parquet file ({reason}); write it again or remove it.") from None


def _read_csv(path: Path, column: str) -> Iterator[tuple[Any, str]]:
    csv.field_size_limit(LIMIT)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(iter(lambda: file.readline(LIMIT), ""), strict=True)
        records = filter(None, reader)  # without blank lines
        try:
            header = next(records, [])
            _check_column(path, column, header)
            index, size = header.index(column), len(header)
            for cells in records:
                yield (cells[index], "") if len(cells) == size else (None, f"{len(cells)} cells, the header has {size}")
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num:,}: not CSV ({error}); check its quotes.") from None


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[Any, str]]:
    # a wrong column is an error of the command, not of each row
    if names := list({name: None for row, _ in islice(_objects(path), 100) for name in row}):
        _check_column(path, column, names)
    for row, reason in _objects(path):
        yield row.get(column), reason or ("" if column in row else f"no {column!r}")


def _objects(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each line's JSON object and "", or an empty one and the reason why the line has none."""
    with path.open("rb") as file:
        whole = True
        while line := file.readline(LIMIT):
            begins, whole = whole, line.endswith(b"\n")
            if begins:  # else it is the rest of a longer line
                try:
                    row = json.loads(line.decode("utf-8-sig", "surrogateescape"))
                    yield (row, "") if isinstance(row, dict) else ({}, "not a JSON object")
                except (ValueError, RecursionError) as error:
                    yield {}, f"not JSON: {error}"


READERS = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}
