"""Finds Parquet, CSV and JSONL files, cuts them into units of consecutive rows, and reads a unit by itself."""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.parquet
from wasabi import msg

from scripts.common import UserError

FORMATS = (".parquet", ".csv", ".jsonl")
BOM = b"\xef\xbb\xbf"
# characters of a CSV field, bytes of a JSONL line: a quote that is never closed, or a file that is one JSON array, must
# not fill the memory
FIELD_LIMIT = 100_000_000


class Unit(NamedTuple):
    """Rows `first` to `first` + `count` - 1 of input file number `file`; `offset` is the byte where row `first` begins
    (0 in Parquet, which has row numbers of its own).
    """

    file: int
    first: int
    count: int
    offset: int


def root_of(source: Path) -> Path:
    """The folder that the input files' names are relative to."""
    return source if source.is_dir() else source.parent


def input_files(source: Path, output: Path) -> list[Path]:
    """The files to annotate, in order: `source` itself, or those below it that are not hidden, nor this
    command's own.

    Raises UserError if there is none, and for a name that is not UTF-8, which no output could hold.
    """
    if source.is_file() and source.suffix in FORMATS:
        return [source]
    files, others = [], []
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        written = source in output.parents and output in path.parents
        if not written and not any(name[0] in "._" for name in path.relative_to(source).parts):
            (files if path.suffix in FORMATS else others).append(path)
    if not files:
        raise UserError(f"{source}: no {', '.join(FORMATS)} file to annotate; name a folder that has some, or a file.")
    if wrong := [path for path in files if not is_utf8(str(path.relative_to(source)))]:
        raise UserError(f"{ascii(str(wrong[0]))}: the file's name is not UTF-8; rename it.")
    if others:
        msg.warn(f"Left out, neither {', '.join(FORMATS)}: {len(others)} file(s), {others[0]} first")
    return files


def is_utf8(text: str) -> bool:
    """Whether the text has no lone surrogates, which stand for what could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fingerprint(path: Path) -> list[int]:
    """Size in bytes, and time of the last change in ns."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def cut(path: Path, column: str, rows: int, file: int = 0) -> Iterator[Unit]:
    """The units of a file, `rows` rows each but the last. Parquet's metadata are read, of the other formats every byte.

    A JSONL file's rows are its lines, empty ones too; a CSV file's are the records after the header, blank lines are
    none. Raises UserError where the file can't be read as what its name says, and where it lacks the column.
    """
    if path.suffix == ".parquet":
        offsets, count = None, _parquet(path, column).metadata.num_rows
    elif path.suffix == ".csv":
        records = _csv_records(path)
        _csv_column(path, column, next(records, (0, []))[1])
        offsets, count = [], 0
        for count, (offset, _) in enumerate(records, 1):
            if count % rows == 1 % rows:
                offsets.append(offset)
    else:
        _check_jsonl_column(path, column)
        offsets, count = _line_offsets(path, rows)
    for first in range(0, count, rows):
        yield Unit(file, first, min(rows, count - first), offsets[first // rows] if offsets else 0)


def read(path: Path, column: str, unit: Unit) -> Iterator[tuple[Any, str]]:
    """Each row's value in the column, and "" or the reason why the row has none. Memory does not grow with the unit.

    Raises OSError and pyarrow.ArrowException where the file can't be read.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, column, unit)
    elif path.suffix == ".csv":
        index = _csv_column(path, column, next(_csv_records(path))[1])
        for _, fields in islice(_csv_records(path, unit.offset), unit.count):
            few = f"the row has {len(fields)} fields, {column!r} is field {index + 1}"
            yield (fields[index], "") if index < len(fields) else (None, few)
    else:
        with path.open("rb") as file:
            file.seek(unit.offset)
            for _ in range(unit.count):
                yield _parse(_line(file), column)


def _parquet(path: Path, column: str) -> pyarrow.parquet.ParquetFile:
    try:
        # a buffer: pages are read as they are needed, not a row group at once
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the file system's own; Arrow's have no number
            raise
        reason = str(error).split("\n")[0].removesuffix(".")
        raise UserError(f"{path}: not a whole Parquet file ({reason}); write it again or take it away.") from None
    _check_column(path, column, file.schema_arrow.names)
    kind = file.schema_arrow.field(file.schema_arrow.names.index(column)).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(is_text(kind) for is_text in (*texts, pyarrow.types.is_null)):
        raise UserError(f"{path}: the column {column!r} is {kind}, not strings; name another column with --column.")
    return file


def _check_column(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        there = ", ".join(map(repr, names[:20])) or "none"
        raise UserError(f"{path}: no column {column!r}; its columns are {there}; name one with --column.")


def _read_parquet(path: Path, column: str, unit: Unit) -> Iterator[tuple[Any, str]]:
    file = _parquet(path, column)
    groups, skip, before = [], unit.first, 0
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if before + rows <= unit.first:
            skip -= rows
        elif before < unit.first + unit.count:
            groups.append(number)
        before += rows
    left = unit.count
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
        values = batch.column(0).slice(skip, left)
        skip, left = max(0, skip - len(batch)), left - len(values)
        for value in values:
            try:
                yield value.as_py(), ""
            except UnicodeDecodeError:
                yield None, "not UTF-8"
        if not left:
            break


def _csv_records(path: Path, offset: int = 0) -> Iterator[tuple[int, list[str]]]:
    """(byte where it begins, fields) of each record that is no blank line, the header among them.

    Raises UserError where Python's csv module can't go on.
    """
    csv.field_size_limit(FIELD_LIMIT)
    start = position = offset

    with path.open("rb") as file:
        file.seek(offset)

        def lines() -> Iterator[str]:
            nonlocal position
            # a bound for lines: a quote may stay open to the end of the file
            while line := file.readline(FIELD_LIMIT):
                text = line.removeprefix(BOM) if position == 0 else line
                position += len(line)
                yield text.decode("utf8", "surrogateescape")  # what is no UTF-8 becomes a bad row, not a crash

        reader = csv.reader(lines())
        try:
            for fields in reader:
                if fields:
                    yield start, fields
                start = position
        except csv.Error as error:
            raise UserError(
                f"{path}: the record at byte {start:,} is no CSV ({error}); close its quotes, end its lines with \\n."
            ) from None


def _csv_column(path: Path, column: str, header: list[str]) -> int:
    _check_column(path, column, header)
    return header.index(column)


def _line(file: Any) -> bytes:
    """The next line, or its first FIELD_LIMIT bytes; the file then stands after the whole line."""
    line = rest = file.readline(FIELD_LIMIT)
    while len(rest) == FIELD_LIMIT and not rest.endswith(b"\n"):
        rest = file.readline(FIELD_LIMIT)
    return line


def _line_offsets(path: Path, rows: int) -> tuple[list[int], int]:
    """The byte where every `rows`-th line begins, and the number of lines."""
    offsets, count, position, last = [0], 0, 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            ends = numpy.flatnonzero(numpy.frombuffer(chunk, dtype="uint8") == ord("\n"))
            offsets += (ends[-(count + 1) % rows :: rows] + position + 1).tolist()
            count, position, last = count + len(ends), position + len(chunk), chunk[-1:]
    return offsets, count + (last != b"\n")


def _parse(line: bytes, column: str) -> tuple[Any, str]:
    if len(line) == FIELD_LIMIT:
        return None, f"the line has more than {FIELD_LIMIT:,} bytes"
    if not line.strip():
        return None, "an empty line"
    try:
        row = json.loads(line.removeprefix(BOM).decode("utf8"))
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"
    if not isinstance(row, dict):
        return None, "not a JSON object"
    return (row[column], "") if column in row else (None, f"no {column!r}")


def _check_jsonl_column(path: Path, column: str) -> None:
    """Raises UserError if no object in the first 100 lines has the column, but others."""
    names: dict[str, None] = {}
    with path.open("rb") as file:
        for _ in range(100):
            try:
                row = json.loads(_line(file).removeprefix(BOM))
            except (ValueError, RecursionError):
                continue
            names |= dict.fromkeys(row if isinstance(row, dict) else ())
    if names:
        _check_column(path, column, list(names))
