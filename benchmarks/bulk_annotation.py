"""What scripts/annotate.py costs beside plain `nlp.pipe`, and what a killed worker and a killed run cost; and the rates
of reading, writing and handing out units alone, and the bytes of a row, which docs/scale.md is made of.

    python benchmarks/bulk_annotation.py it_panx_xlmr --test corpus/test.spacy

One thread a worker. Plain, one and two workers take turns; the medians of the rounds are shown with least and most.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import spacy
import srsly
import torch
import typer
from spacy.tokens import DocBin

from scripts.annotate.units import FORMATS, cut, read
from scripts.annotate.worker import SCHEMA, annotate_unit

ROOT = Path(__file__).resolve().parent.parent

ROWS_ALONE = 200_000  # rows of the files on which reading and writing are timed alone


def write(texts: list[str], path: Path) -> Path:
    """Writes the texts as one of the formats, in the column `text`."""
    table = pyarrow.table({"text": texts})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        srsly.write_jsonl(path, ({"text": text} for text in texts))
    return path


def plain(model: str, texts: list[str]) -> float:
    """Rows/s of `nlp.pipe` on one thread, its entities read."""
    torch.set_num_threads(1)
    nlp = spacy.load(model)
    list(nlp.pipe(texts[:64]))
    start = time.perf_counter()
    for doc in nlp.pipe(texts):
        [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]
    return len(texts) / (time.perf_counter() - start)


def in_one_process(model: str, texts: list[str], folder: Path, unit_rows: int) -> Path:
    """Prints the CPU seconds of `nlp.pipe` and those of annotating the same rows from and to files, both without Ray:
    a figure that other load hardly changes. Returns the folder of annotated rows.
    """
    torch.set_num_threads(1)
    nlp, source, output = spacy.load(model), write(texts, folder / "single.parquet"), folder / "single"
    list(nlp.pipe(texts[:64]))
    start = time.process_time()
    for doc in nlp.pipe(texts):
        [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]
    piped = time.process_time() - start
    start = time.process_time()
    for unit in cut(source, "text", unit_rows):
        annotate_unit(nlp, source, source.name, "text", 100_000, unit, output)
    annotated = time.process_time() - start
    rates = f"nlp.pipe {len(texts) / piped:,.1f} rows/CPU s, units from file to file {len(texts) / annotated:,.1f}"
    print(f"Without Ray, one thread: {rates} ({annotated / piped - 1:+.1%} CPU time).")
    return output


class Run:
    """The command, started; `rate` is the rows/s that it says itself, `seconds` those from its start to its end."""

    def __init__(self, model: str, source: Path, output: Path, workers: int, unit_rows: int) -> None:
        command = [sys.executable, "-m", "scripts.annotate", model, source, output]
        command += ["--workers", workers, "--unit-rows", unit_rows]
        self.output, self.start = output, time.perf_counter()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([str(part) for part in command], start_new_session=True, **pipes)

    def wait_for(self, pattern: str, count: int) -> Path:
        """The first of `count` files, once so many are there."""
        while len(found := sorted(self.output.glob(pattern))) < count:
            if self.process.poll() is not None:
                raise RuntimeError(self.process.stdout.read())
            time.sleep(0.01)
        return found[0]

    def kill(self) -> float:
        """Kills the command and what it started; returns the seconds that it ran."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        return time.perf_counter() - self.start

    def end(self) -> "Run":
        """Waits for the end. Raises RuntimeError where the command failed."""
        printed = self.process.communicate()[0]
        if self.process.returncode:
            raise RuntimeError(printed)
        self.seconds = time.perf_counter() - self.start
        self.rate = float(re.search(r"([\d,.]+) rows/s", " ".join(printed.split()))[1].replace(",", ""))
        return self


def check(output: Path, count: int) -> str:
    """How many rows are there twice, and how many are missing."""
    parts = [pyarrow.parquet.read_table(part, columns=["row"]) for part in output.glob("*.parquet")]
    seen = Counter(row for part in parts for row in part["row"].to_pylist())
    return f"rows twice {seen.total() - len(seen)}, lost {count - len(seen)}"


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):,.1f} ({min(values):,.1f}–{max(values):,.1f})"


def compare(model: str, texts: list[str], folder: Path, rounds: int, unit_rows: int) -> None:
    """Prints the rates with Ray, in seconds by the clock, and what kills cost."""
    source = write(texts, folder / "texts.parquet")
    rates: dict[str, list[float]] = {"plain nlp.pipe": [], "1 worker": [], "2 workers": []}
    ends: dict[str, list[float]] = {"1 worker": [], "2 workers": []}
    for number in range(rounds):
        rates["plain nlp.pipe"].append(plain(model, texts))
        for workers, name in enumerate(ends, 1):
            run = Run(model, source, folder / f"{number}-{workers}", workers, unit_rows).end()
            rates[name].append(run.rate)
            ends[name].append(run.seconds)
    base = statistics.median(rates["plain nlp.pipe"])
    print("| | rows/s | ratio | rows/s, Ray's start and end included |\n|---|---|---|---|")
    for name, values in rates.items():
        included = spread([len(texts) / seconds for seconds in ends[name]]) if name in ends else ""
        print(f"| {name} | {spread(values)} | {statistics.median(values) / base:.2f} | {included} |")
    undisturbed = statistics.median(ends["2 workers"])
    run = Run(model, source, folder / "worker", 2, unit_rows)
    run.wait_for("part-*", 2)
    os.kill(int(run.wait_for(".part-*.partial-*", 1).name.rpartition("-")[2]), signal.SIGKILL)
    extra = run.end().seconds - undisturbed
    print(f"\n2 workers undisturbed: {undisturbed:.1f} s. One killed: {extra:+.1f} s, {check(run.output, len(texts))}.")
    run = Run(model, source, folder / "run", 2, unit_rows)
    run.wait_for("part-*", -(-len(texts) // unit_rows) // 2)
    first = run.kill()
    kept = len(list(run.output.glob("part-*")))
    second = Run(model, source, folder / "run", 2, unit_rows).end()
    print(
        f"The run killed after {first:.1f} s with {kept} units written, started again: {second.seconds:.1f} s; "
        f"together {first + second.seconds - undisturbed:+.1f} s, {check(run.output, len(texts))}."
    )


def alone(texts: list[str], annotated: Path, folder: Path) -> None:
    """Prints the rates of cutting, reading and writing without a pipeline, in CPU seconds, and the bytes of a row."""
    many = [f"{texts[number % len(texts)]} {number}" for number in range(ROWS_ALONE)]
    print("\n| | MB | cutting, rows/CPU s | reading, rows/CPU s |\n|---|---|---|---|")
    for suffix in FORMATS:
        path = write(many, folder / f"many{suffix}")
        start = time.process_time()
        units = list(cut(path, "text", 10_000))
        cutting = time.process_time() - start
        start = time.process_time()
        for unit in units:
            for _ in read(path, "text", unit):
                pass
        reading = time.process_time() - start
        size = path.stat().st_size / 1e6
        print(f"| {suffix} | {size:.1f} | {ROWS_ALONE / cutting:,.0f} | {ROWS_ALONE / reading:,.0f} |")
    rows = [row for part in sorted(annotated.glob("*.parquet")) for row in pyarrow.parquet.read_table(part).to_pylist()]
    rows = (rows * (ROWS_ALONE // len(rows) + 1))[:ROWS_ALONE]
    start = time.process_time()
    for first in range(0, ROWS_ALONE, 10_000):
        with pyarrow.parquet.ParquetWriter(folder / f"w{first}", SCHEMA, compression="zstd") as writer:
            writer.write_table(pyarrow.Table.from_pylist(rows[first : first + 10_000], schema=SCHEMA))
    print(f"\nWriting: {ROWS_ALONE / (time.process_time() - start):,.0f} rows/CPU s.")
    sizes: Counter[str] = Counter()
    whole = folder / "whole.parquet"
    table = pyarrow.concat_tables(pyarrow.parquet.read_table(part) for part in sorted(annotated.glob("*.parquet")))
    pyarrow.parquet.write_table(table, whole, compression="zstd")  # one unit, as large runs have them
    group = pyarrow.parquet.read_metadata(whole).row_group(0)
    for number in range(group.num_columns):
        column = group.column(number)
        sizes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    count, characters = len(table), sum(map(len, table["text"].to_pylist()))
    entities = sum(map(len, table["entities"].to_pylist()))
    words = sum(len(text.split()) for text in table["text"].to_pylist())
    print(f"\n{count:,} rows; a row has {words / count:.2f} words, {characters / count:.1f} characters and")
    print(f"{entities / count:.2f} entities.")
    columns = ", ".join(f"{name} {size / count:.1f}" for name, size in sizes.items())
    print(f"Bytes of a row: {whole.stat().st_size / count:.1f} ({columns}).")


def units_alone(folder: Path) -> None:
    """Prints the seconds that a unit of one row costs with a pipeline that does nothing."""
    spacy.blank("it").to_disk(folder / "blank")
    count = 1000
    run = Run(str(folder / "blank"), write(["Bari"] * count, folder / "units.jsonl"), folder / "units", 2, 1).end()
    print(f"{count} units of one row, blank pipeline, 2 workers: {1000 / run.rate:.1f} ms a unit.")


def main(
    model: Annotated[str, typer.Argument(help="Installed pipeline", show_default=False)],
    test: Annotated[Path, typer.Option(help="Sentences (.spacy)")] = ROOT / "corpus" / "test.spacy",
    count: Annotated[int, typer.Option(help="Sentences to annotate")] = 4000,
    rounds: Annotated[int, typer.Option(help="How often each is timed; 0: only what needs no Ray")] = 3,
    unit_rows: Annotated[int, typer.Option(help="Rows of a unit")] = 250,
) -> None:
    """Compare scripts/annotate.py with plain `nlp.pipe`, kill it, and time its parts."""
    texts = [doc.text for doc in DocBin().from_disk(test).get_docs(spacy.blank("it").vocab)][:count]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{len(texts)} rows in units of {unit_rows}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        alone(texts, in_one_process(model, texts, folder, unit_rows), folder)
        if rounds:
            compare(model, texts, folder, rounds, unit_rows)
            units_alone(folder)
        print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    typer.run(main)
