"""Measure what an installed package costs until its first entity: CPU seconds and memory, medians of five processes.

    build/demo-venv/bin/python benchmarks/first_entity.py it_panx_xlmr

Run it in the environment of the package; it needs nothing else of this project. Each process has one thread. The last
row, one process, is the peak memory with a text of a million characters; it takes minutes.
"""

import os
import statistics
import subprocess
import sys

ROWS = ("import spacy", "spacy.load, with its imports", "first text", "all", "a second spacy.load", "peak memory")
ROWS += ("peak memory, 1,000,000 characters",)
ONE = """
import sys, time
times = [time.process_time()]
import spacy
times.append(time.process_time())
nlp = spacy.load(sys.argv[1])
times.append(time.process_time())
nlp("Grazia Deledda nacque a Nuoro.")
times.append(time.process_time())
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
spacy.load(sys.argv[1])
times.append(time.process_time())
steps = [after - before for before, after in zip(times, times[1:])]
print(*steps[:3], times[3], steps[3], int(peak) / 1000)
"""
LONG = """
import sys
import spacy
text = "Grazia Deledda nacque a Nuoro, studiò da sola e scrisse molti romanzi sulla gente della sua isola. " * 20_000
spacy.load(sys.argv[1])(text[:1_000_000])
print(int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1000)
"""


def run(code: str, package: str) -> list[float]:
    """Return what the code prints in a new process. Exits with one sentence if it fails."""
    command = [sys.executable, "-c", code, package]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{package} does not run here: {done.stderr.strip().splitlines()[-1]}")
    return [float(figure) for figure in done.stdout.split()]


def main() -> None:
    """Print the figures."""
    if len(sys.argv) != 2:
        sys.exit("Expected one argument: the name of an installed package.")
    package = sys.argv[1]
    figures = [statistics.median(values) for values in zip(*(run(ONE, package) for _ in range(5)), strict=True)]
    for name, figure in zip(ROWS, [*figures, *run(LONG, package)], strict=True):
        unit = "MB" if "memory" in name else "s of CPU time"
        print(f"{name:35} {figure:7.2f} {unit}")


if __name__ == "__main__":
    main()
