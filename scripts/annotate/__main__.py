"""Annotate folders of Parquet, CSV and JSONL files with a pipeline's entities, on many cores, GPUs or machines.

    python -m scripts.annotate it_panx_xlmr articles/ annotated/ --column text

This process reads the input and hands units of consecutive rows to Ray actors that hold the pipeline. An actor writes
each unit to a file named after the unit, atomically. The same command, started again, skips the files that exist.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import srsly
import typer
from spacy.util import is_package
from tqdm import tqdm
from wasabi import msg

import scripts
from scripts.annotate.units import UNIT_CHARS, Unit, fingerprint, input_files, read, units
from scripts.annotate.worker import Annotator, identify
from scripts.common import UserError, one_sentence, replacing

ATTEMPTS = 4  # a unit is given up once this number of workers died on it


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Create the folder and lock it until the block or the process ends. Raises UserError while another run has it."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "_lock").open("a") as file:  # network file systems lock only what is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another run writes there; wait until it ends.") from None
        yield


def begin(output: Path, run: dict[str, Any]) -> None:
    """Note the first run's settings and input files. Raises UserError if a later run has others."""
    manifest = output / "_manifest.json"
    if manifest.exists():
        old = srsly.read_json(manifest)
        for key in sorted({*run, *old}):
            if run.get(key) != old.get(key):
                change = f"{key} was {old.get(key)}, and is now {run.get(key)}"
                raise UserError(f"{output} belongs to another run: {change}; name a new folder, or repeat that run.")
    elif any(path.name[0] not in "._" for path in output.iterdir()):
        raise UserError(f"{output}: not empty, and not created by this command; name a new folder.")
    else:
        with replacing(manifest) as temporary:
            srsly.write_json(temporary, run)


def start_ray(address: str, cpus: int | None) -> ModuleType:
    """Connect to a Ray cluster or start Ray on this machine; return the module. Raises UserError if there is none."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("Ray is not installed; run `pip install -r requirements-annotate.txt`.") from None
    local = {} if address else {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(address or "local", logging_level="ERROR", log_to_driver=False, **local)
    except Exception as error:  # Ray raises Exception itself if it does not start in time
        reason = str(error).split("\n")[0].removesuffix(".")
        hint = "see `ray status`, and give this command the cluster's RAY_AUTH_MODE and RAY_AUTH_TOKEN"
        raise UserError(f"No Ray answers at {address or 'this machine'} ({reason}); {hint}.") from None
    ray.cloudpickle.register_pickle_by_value(scripts)  # the cluster's machines do not have this project
    return ray


def fitting_workers(machines: Sequence[dict[str, Any]], cpus: int, gpus: float) -> int:
    """Return how many workers with that number of CPUs and GPUs each fit on Ray's machines. Raises UserError."""
    needs = {kind: need for kind, need in (("CPU", cpus), ("GPU", gpus)) if need}
    alive = [machine["Resources"] for machine in machines if machine["Alive"]]
    fitting = sum(int(min(has.get(kind, 0) / need for kind, need in needs.items())) for has in alive)
    if not fitting:
        raise UserError(f"No worker fits: each needs {cpus} CPUs and {gpus:g} GPUs, more than any machine has.")
    return fitting


def annotate(
    ray: ModuleType, unit: Unit | None, todo: Iterator[Unit], actor: Sequence[Any], workers: int, **resources: float
) -> tuple[int, int]:
    """Annotate units and return the numbers of rows and of bad rows. Raises UserError if units failed."""
    # Ray restarts a worker that was killed and repeats its unit
    new = ray.remote(**resources, max_restarts=-1, max_task_retries=ATTEMPTS - 1)(Annotator).remote
    running, errors, rows, bad = {}, [], 0, 0
    with tqdm(unit=" rows", disable=None) as bar:
        while unit or running:
            if unit and len(running) < workers:
                worker = new(*actor)
            else:
                (ready,), _ = ray.wait(list(running))
                worker, ended = running.pop(ready)
                try:
                    bad += ray.get(ready)
                    rows += len(ended.rows)
                    bar.update(len(ended.rows))
                except ray.exceptions.RayError as error:
                    reason = getattr(error, "cause", str(error).strip().split("\n")[-1])
                    if isinstance(error, ray.exceptions.RayActorError):
                        reason = f"{ATTEMPTS} workers died on it, perhaps for lack of memory."
                    errors.append(f"{ended.name}, {len(ended.rows):,} rows from row {ended.first:,}: {reason}")
            if unit:
                running[worker.annotate.remote(unit)] = worker, unit
                unit = next(todo, None) if len(errors) <= workers else None  # read while the workers annotate
    if errors:
        first = " ".join(errors[0].split())
        raise UserError(f"Not annotated: {len(errors)} unit(s); {first} Run again, the command goes on from here.")
    return rows, bad


def main(
    model: Annotated[str, typer.Argument(help="Installed pipeline, or a pipeline's folder", show_default=False)],
    source: Annotated[Path, typer.Argument(help="Folder of Parquet, CSV, JSONL files, or a file", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for the annotated rows", show_default=False)],
    column: Annotated[str, typer.Option(help="Column with the texts")] = "text",
    workers: Annotated[int, typer.Option(min=0, help="Processes that annotate; 0: as many as fit")] = 0,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="CPU cores and threads per worker")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs per worker; 0.5: two share one")] = 0,
    precision: Annotated[Literal["float32", "bfloat16", "int8"] | None, typer.Option(help="Else as packaged")] = None,
    address: Annotated[str, typer.Option(help="Ray cluster: HOST:PORT or auto; without it, this machine")] = "",
    max_chars: Annotated[int, typer.Option(min=1, help="Longer texts are bad rows")] = 100_000,
    unit_rows: Annotated[int, typer.Option(min=1, help="Rows per output file, and per step of a worker")] = 10_000,
) -> None:
    """Annotate the texts in files with a pipeline's entities. Run the command again to resume."""
    start = time.time()
    with one_sentence():
        source, output = source.resolve(), output.resolve()
        model = model if is_package(model) else str(Path(model).resolve())
        if precision == "int8" and gpus_per_worker:
            raise UserError("--precision int8 is for CPUs; use bfloat16 on GPUs.")
        settings = {"model": identify(model, precision), "precision": precision, "column": column}
        settings |= {"max_chars": max_chars, "unit_rows": unit_rows, "unit_chars": UNIT_CHARS}
        files = input_files(source, output)
        for path in files.values():
            next(read(path, column, max_chars), None)  # a file that can't be read stops the run before it begins
        with only_one(output):
            begin(output, settings | {name: fingerprint(path) for name, path in files.items()})
            todo = (unit for unit in units(files, column, max_chars, unit_rows) if not (output / unit.part).exists())
            if not (first := next(todo, None)):
                return msg.good(f"{output}: nothing left to do.")
            actor = (model, output, settings, cpus_per_worker, gpus_per_worker > 0)
            try:
                ray = start_ray(address, workers * cpus_per_worker or None)
                fitting = fitting_workers(ray.nodes(), cpus_per_worker, gpus_per_worker)
                resources = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
                rows, bad = annotate(ray, first, todo, actor, min(workers or fitting, fitting), **resources)
            except KeyboardInterrupt:
                raise UserError("Stopped; the same command goes on from here.") from None
        bad_rows = f" ({bad:,} bad ones: {output / '_bad'})" if bad else ""
        msg.good(f"{output}: {rows:,} rows{bad_rows} annotated in {time.time() - start:,.0f} s.")


if __name__ == "__main__":
    typer.run(main)
