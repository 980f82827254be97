"""Measure what an installed package costs until its first entity: CPU seconds and memory, medians of five processes.

    build/demo-venv/bin/python benchmarks/first_entity.py it_panx_xlmr

Run it in the environment of the package; it needs nothing else of this project. Each process has one thread.
"""

import os
import statistics
import subprocess
import sys

COSTS = ("import spacy", "spacy.load, with its imports", "first text", "all", "a second spacy.load", "peak memory")
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


def main() -> None:
    """Print the medians."""
    if len(sys.argv) != 2:
        sys.exit("Expected one argument: the name of an installed package.")
    command = [sys.executable, "-c", ONE, sys.argv[1]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{sys.argv[1]} does not run here: {done.stderr.strip().splitlines()[-1]}")
        runs.append(done.stdout)
    for name, values in zip(COSTS, zip(*(map(float, run.split()) for run in runs), strict=True), strict=True):
        unit = "MB" if "memory" in name else "s of CPU time"
        print(f"{name:30} {statistics.median(values):7.2f} {unit}")


if __name__ == "__main__":
    main()
