"""Compare `python -m scripts.annotate` with plain `nlp.pipe`, kill it, and time reading and writing alone.

    python -m benchmarks.bulk_annotation it_panx_xlmr --test corpus/test.spacy

Prints the figures of docs/annotate.md. One thread per worker. Times by the clock are medians of rounds in which plain,
one and two workers take turns, with minimum and maximum; the other times are CPU seconds.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
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
from spacy.language import Language
from spacy.tokens import DocBin

from scripts.annotate.units import READERS, read, units
from scripts.annotate.worker import Annotator

ROOT = Path(__file__).resolve().parent.parent
ROWS = 200_000  # rows of the files on which reading is timed


def write(texts: list[str], path: Path) -> Path:
    """Write the texts as Parquet, CSV or JSONL, in the column `text`."""
    table = pyarrow.table({"text": texts})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        srsly.write_jsonl(path, ({"text": text} for text in texts))
    return path


def start(model: str, source: Path, output: Path, workers: int, unit_rows: int) -> subprocess.Popen[str]:
    """Start the command."""
    options = ["--workers", str(workers), "--unit-rows", str(unit_rows)]
    command = [sys.executable, "-m", "scripts.annotate", model, str(source), str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def end(run: subprocess.Popen[str]) -> None:
    """Wait until the run ends. Raises RuntimeError if it failed."""
    printed = run.communicate()[0]
    if run.returncode:
        raise RuntimeError(printed)


def pgrep(*arguments: str) -> list[str]:
    """Return the ids of processes."""
    return subprocess.run(["pgrep", *arguments], capture_output=True, text=True, check=True).stdout.split()


def time_pipe(nlp: Language, texts: list[str]) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of `nlp.pipe`."""
    start, start_cpu = time.perf_counter(), time.process_time()
    for doc in nlp.pipe(texts):
        [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]
    return time.perf_counter() - start, time.process_time() - start_cpu


def alone(nlp: Language, texts: list[str], folder: Path, unit_rows: int) -> None:
    """Print rows per CPU second of reading and of a unit from file to file, without Ray, and the bytes of a row."""
    many = [f"{texts[number % len(texts)]} {number}" for number in range(ROWS)]
    for suffix in READERS:
        path = write(many, folder / f"many{suffix}")
        start = time.process_time()
        for _ in read(path, "text", 100_000):
            pass
        print(f"Reading {suffix}: {ROWS / (time.process_time() - start):,.0f} rows/CPU s.")
    source, output = write(texts, folder / "alone.parquet"), folder / "alone"
    annotator = Annotator("", output, {}, 1, False)
    annotator.nlp = nlp
    start = time.process_time()
    for unit in units({source.name: source}, "text", 100_000, unit_rows):
        annotator.annotate(unit)
    annotated = time.process_time() - start
    print(f"nlp.pipe: {len(texts) / time_pipe(nlp, texts)[1]:,.1f} rows/CPU s.")
    print(f"Units from file to file: {len(texts) / annotated:,.1f} rows/CPU s.")
    whole = pyarrow.concat_tables(pyarrow.parquet.read_table(part) for part in sorted(output.glob("*.parquet")))
    pyarrow.parquet.write_table(whole, folder / "whole.parquet", compression="zstd")  # one unit, as large runs have
    size = (folder / "whole.parquet").stat().st_size / len(texts)
    words = sum(len(text.split()) for text in texts) / len(texts)
    entities = sum(map(len, whole["entities"].to_pylist())) / len(texts)
    print(f"A row: {words:.2f} words, {entities:.2f} entities, {size:.1f} bytes of output.")


def compare(nlp: Language, model: str, texts: list[str], folder: Path, rounds: int, unit_rows: int) -> None:
    """Print the times with Ray, and what kills cost."""
    source, one = write(texts, folder / "texts.parquet"), write(texts[:1], folder / "one.parquet")
    seconds: dict[str, list[float]] = {"plain nlp.pipe": [], "1 row": [], "1 worker": [], "2 workers": []}
    for number in range(rounds):
        seconds["plain nlp.pipe"].append(time_pipe(nlp, texts)[0])
        for name, rows, workers in (("1 row", one, 1), ("1 worker", source, 1), ("2 workers", source, 2)):
            begun = time.perf_counter()
            end(start(model, rows, folder / f"{number} {name}", workers, unit_rows))
            seconds[name].append(time.perf_counter() - begun)
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):,.1f} ({min(values):,.1f}–{max(values):,.1f}) s")
    for killed in ("worker", "run"):
        output, begun = folder / killed, time.perf_counter()
        run = start(model, source, output, 2, unit_rows)
        while len(list(output.glob("part-*"))) < len(texts) // unit_rows // 2:
            time.sleep(0.01)
        if killed == "worker":
            raylet = ",".join(pgrep("-P", str(run.pid)))
            os.kill(int(pgrep("-f", "^ray::Annotator", "-P", raylet)[0]), signal.SIGKILL)
        else:
            run.kill()
            run.communicate()
            run = start(model, source, output, 2, unit_rows)
        end(run)
        extra = time.perf_counter() - begun - statistics.median(seconds["2 workers"])
        rows = [row for part in output.glob("*.parquet") for row in pyarrow.parquet.read_table(part)["row"].to_pylist()]
        twice, lost = len(rows) - len({*rows}), len(texts) - len({*rows})
        print(f"2 workers, the {killed} killed in the middle: {extra:+.1f} s, rows twice {twice}, lost {lost}.")


def main(
    model: Annotated[str, typer.Argument(help="Installed pipeline", show_default=False)],
    test: Annotated[Path, typer.Option(help="Sentences (.spacy)")] = ROOT / "corpus" / "test.spacy",
    count: Annotated[int, typer.Option(help="Sentences to annotate")] = 4000,
    rounds: Annotated[int, typer.Option(help="Rounds of the times by the clock; 0: only what needs no Ray")] = 3,
    unit_rows: Annotated[int, typer.Option(help="Rows per unit")] = 250,
) -> None:
    """Compare bulk annotation with plain `nlp.pipe`, kill it, and time its parts."""
    torch.set_num_threads(1)
    nlp = spacy.load(model)
    texts = [doc.text for doc in DocBin().from_disk(test).get_docs(spacy.blank("it").vocab)][:count]
    print(f"{len(texts)} rows in units of {unit_rows}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        alone(nlp, texts, Path(name), unit_rows)
        if rounds:
            compare(nlp, model, texts, Path(name), rounds, unit_rows)


if __name__ == "__main__":
    typer.run(main)
