"""Annotates folders of Parquet, CSV and JSONL files with a pipeline's entities, on many cores, GPUs or machines.

    python -m scripts.annotate it_panx_xlmr articles/ annotated/ --column text

The work is cut into units of consecutive rows. An actor of Ray Data holds the pipeline and writes each unit's rows to a
file that is named after the unit and appears whole or not at all: what is there when the command runs again is done.
A unit's bad rows, with the reason, are in a file of the same name in `_bad`.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import spacy
import srsly
import torch
import typer
from spacy.util import get_package_path, is_package
from tqdm import tqdm
from wasabi import msg

from scripts.annotate.units import Unit, cut, fingerprint, input_files, root_of
from scripts.annotate.worker import annotate_unit, bad_path, part_path
from scripts.common import UserError, one_sentence, replacing

MANIFEST, TRIED, LOCK = "_manifest.json", "_tried", "_lock"
ATTEMPTS = 4  # a unit on which so many workers died is given up
# sent to the workers as they are here: a cluster's machines need the pipeline's package, not these files
SHIPPED = ("annotate_unit", "atomic", "errors", "units", __name__)


def identify(model: str) -> str:
    """Name, version and SHA-256 (of all files, code and weights) of an installed pipeline or of one in a folder.

    Raises UserError if there is none, and for a folder of this project's, whose code no other machine has.
    """
    folder = get_package_path(model) if is_package(model) else Path(model)
    if not (folder / "meta.json").is_file():
        raise UserError(f"{model}: neither an installed pipeline nor a pipeline's folder; install its wheel first.")
    if not is_package(model) and "panx_xlmr." in (folder / "config.cfg").read_text(encoding="utf8"):
        raise UserError(f"{model}: a pipeline without its code; install the wheel that `package` makes and name that.")
    meta, digest = srsly.read_json(folder / "meta.json"), hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return f"{meta['lang']}_{meta['name']} {meta['version']} {digest.hexdigest()}"


def plan(source: Path, output: Path, settings: dict[str, Any]) -> tuple[dict[str, list[int]], list[Unit]]:
    """The input files' fingerprints by name, and the units they are cut into; the first run writes both down.

    Raises UserError where the output was begun with another model, other settings or other files.
    """
    files = input_files(source, output)
    inputs = {path.relative_to(root_of(source)).as_posix(): fingerprint(path) for path in files}
    if (output / MANIFEST).exists():
        begun = srsly.read_json(output / MANIFEST)
        old = begun["settings"]
        changes = [f"{key} {old[key]}, not {settings[key]}" for key in settings if old[key] != settings[key]]
        names = sorted(inputs.keys() | begun["inputs"].keys())
        changes += [f"another {name}" for name in names if begun["inputs"].get(name) != inputs.get(name)]
        if changes:
            raise UserError(f"{output} was begun with {changes[0]}; name a new folder, or go on as it was begun.")
        return inputs, [Unit(*unit) for unit in begun["units"]]
    left = f".{MANIFEST}.partial-"  # by a run that was killed while it wrote that
    if any(path.name != LOCK and not path.name.startswith(left) for path in output.iterdir()):
        raise UserError(f"{output}: not empty, and not begun by this command; name a new folder.")
    units: list[Unit] = []
    for number, path in enumerate(tqdm(files, "Cutting", unit=" files", disable=None)):
        units += cut(path, settings["column"], settings["unit_rows"], number)
    with replacing(output / MANIFEST) as temporary:
        srsly.write_json(temporary, {"settings": settings, "inputs": inputs, "units": units}, indent=0)
    return inputs, units


class Annotator:
    """The actor: holds the pipeline and annotates one unit a call."""

    def __init__(self, model: str, root: Path, output: Path, settings: dict[str, Any], cpus: int, gpu: bool) -> None:
        self.root, self.output, self.settings, self.refusal = root, output, settings, ""
        torch.set_num_threads(cpus)
        try:
            if gpu:
                spacy.require_gpu()
            if identify(model) != settings["model"]:
                raise UserError(f"{model} is another there; install the same wheel.")
            self.nlp = spacy.load(model)
            self.nlp.max_length = max(self.nlp.max_length, settings["max_chars"])
        except Exception as error:  # Ray would end the run with a traceback, or start the actor again without end
            traceback.print_exc()  # into Ray's log of this worker
            self.refusal = f"{socket.gethostname()}: {error}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Takes a batch of one: a unit, and its file's name and fingerprint. Gives its numbers of rows and bad rows,
        the seconds since 1970 when it was begun and ended, and the error that it ended with, if any.
        """
        unit = Unit(*(int(batch[field][0]) for field in Unit._fields))
        name, begun, error = str(batch["name"][0]), time.time(), self.refusal
        try:
            # it is there if the worker was killed between writing and answering
            if not error and not part_path(self.output, unit).exists():
                if fingerprint(self.root / name) != batch["fingerprint"][0].tolist():
                    raise UserError("it has changed since the run began; name a new output folder.")
                with (self.output / TRIED / part_path(self.output, unit).stem).open("ab") as tried:
                    if tried.tell() == ATTEMPTS:
                        raise UserError(f"{ATTEMPTS} workers died on its {unit.count} rows from {unit.first} on.")
                    tried.write(b".")
                column, max_chars = self.settings["column"], self.settings["max_chars"]
                annotate_unit(self.nlp, self.root / name, name, column, max_chars, unit, self.output)
        except Exception as raised:
            traceback.print_exc()
            error = f"{name}: {raised}"
        bad = bad_path(self.output, unit)
        bad_rows = len(bad.read_bytes().splitlines()) if bad.exists() else 0
        result = {"rows": unit.count, "bad": bad_rows, "begun": begun, "ended": time.time(), "error": error}
        return {key: [value] for key, value in result.items()}


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Makes the folder, and removes it if nothing was begun there. Raises UserError while another run writes to it; the
    system lets go of the lock when that run ends.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("a") as file:  # shared file systems lock what may be written only
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another run writes there; let it end.") from None
        try:
            yield
        finally:
            if not (output / MANIFEST).exists():
                (output / LOCK).unlink()
                with contextlib.suppress(OSError):  # it is not empty
                    output.rmdir()


@contextlib.contextmanager
def ray_session(address: str, cpus: int | None) -> Iterator[None]:
    """A session in the cluster, or in a Ray of this machine's own with so many CPUs; quiet, without usage reports.

    Raises UserError without Ray, and where no cluster answers.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise UserError("Ray is not installed; run `pip install -r requirements-annotate.txt`.") from None
    own = {} if address else {"num_cpus": cpus, "object_store_memory": 100_000_000, "include_dashboard": False}
    try:
        ray.init(address or "local", logging_level="ERROR", log_to_driver=False, **own)
    except Exception as error:  # Ray raises that itself where it does not start in time
        reason = str(error).split("\n")[0].removesuffix(".")
        raise UserError(
            f"No Ray answers at {address or 'this machine'} ({reason}); see `ray status`, and give this command the "
            "cluster's RAY_AUTH_MODE and RAY_AUTH_TOKEN."
        ) from None
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel("ERROR")
        for name in SHIPPED:
            ray.cloudpickle.register_pickle_by_value(sys.modules[name])
        yield
    finally:
        ray.shutdown()


def fitting_workers(machines: Sequence[dict[str, float]], cpus: int, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs each fit on Ray's machines, each of them on one."""
    needs = {"CPU": cpus, "GPU": gpus}
    return sum(int(min(there.get(kind, 0) / need for kind, need in needs.items() if need)) for there in machines)


def work(
    items: Sequence[dict[str, Any]], actor: Sequence[Any], workers: int, cpus: int, gpus: float, bar: tqdm
) -> dict[str, float]:
    """Annotates units in the present Ray session: `items` are what an Annotator is called with, `actor` what it is made
    of. Returns what `annotate` does, without `before` and `seconds`.

    Raises UserError where no worker fits; where units failed, at the end or once more failed than there are workers.
    """
    import ray

    fitting = fitting_workers([node["Resources"] for node in ray.nodes() if node["Alive"]], cpus, gpus)
    if not fitting:
        raise UserError(f"No worker fits: each needs {cpus} CPUs and {gpus:g} GPUs, more than a machine of Ray's has.")
    workers = min(workers or fitting, fitting, len(items))
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Annotator,
        fn_constructor_args=(*actor, cpus, gpus > 0),
        batch_size=1,
        # Ray Data starts a killed actor again and gives its unit out again, without a limit
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    done, errors = [], []
    for result in results.iter_rows():
        if result["error"]:
            errors.append(result["error"])
            if len(errors) > workers:
                break
        else:
            done.append((result["begun"], result["ended"], result["rows"], result["bad"]))
            bar.update(result["rows"])
    if errors:
        raise UserError(f"Not annotated: {len(errors)} unit(s); {errors[0]} Run again, the command goes on from here.")
    begun, ended, rows, bad = zip(*done, strict=True)
    return {"rows": sum(rows), "bad": sum(bad), "workers": workers, "work": max(ended) - min(begun)}


def annotate(
    model: str,
    source: Path,
    output: Path,
    column: str = "text",
    workers: int = 0,
    cpus: int = 1,
    gpus: float = 0,
    address: str = "",
    max_chars: int = 100_000,
    unit_rows: int = 10_000,
) -> dict[str, float]:
    """Annotates what is not yet annotated, with so many workers (0: as many as fit) of so many CPUs and GPUs each.

    Returns the numbers of `rows` and `bad` rows of this run, of rows `before` it, of `workers`, its `seconds`, and the
    seconds at `work`, first unit's begin to last unit's end. Raises UserError for bad input, and where units failed.
    """
    start = time.time()
    source, output = source.resolve(), output.resolve()
    model = model if is_package(model) else str(Path(model).resolve())
    settings = {"model": identify(model), "column": column, "max_chars": max_chars, "unit_rows": unit_rows}
    with only_one(output):
        inputs, units = plan(source, output, settings)
        names = list(inputs)
        there = {entry.name for entry in os.scandir(output)}
        todo = [unit for unit in units if part_path(output, unit).name not in there]
        before = sum(unit.count for unit in units) - sum(unit.count for unit in todo)
        result = {"rows": 0, "bad": 0, "workers": 0, "work": 0.0}
        if todo:
            shutil.rmtree(output / TRIED, ignore_errors=True)
            (output / TRIED).mkdir()
            items = [
                {**unit._asdict(), "name": names[unit.file], "fingerprint": inputs[names[unit.file]]} for unit in todo
            ]
            actor = (model, root_of(source), output, settings)
            total = sum(unit.count for unit in units)
            with (
                ray_session(address, workers * cpus or None),
                tqdm(total=total, initial=before, unit=" rows", disable=None) as bar,
            ):
                result = work(items, actor, workers, cpus, gpus, bar)
            shutil.rmtree(output / TRIED, ignore_errors=True)
    return result | {"before": before, "seconds": time.time() - start}


def main(
    model: Annotated[str, typer.Argument(help="Installed pipeline, or a pipeline's folder", show_default=False)],
    source: Annotated[Path, typer.Argument(help="Folder of Parquet, CSV, JSONL files, or a file", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for the annotated rows", show_default=False)],
    column: Annotated[str, typer.Option(help="The column with the texts")] = "text",
    workers: Annotated[int, typer.Option(min=0, help="Processes that annotate; 0: as many as fit")] = 0,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="CPU cores, and threads, of each")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each; 0.5: two share one")] = 0,
    address: Annotated[str, typer.Option(help="Ray cluster: HOST:PORT, or auto; without it, this machine")] = "",
    max_chars: Annotated[int, typer.Option(min=1, help="Longer texts are bad rows")] = 100_000,
    unit_rows: Annotated[int, typer.Option(min=1, help="Rows of a unit: a killed worker's are done again")] = 10_000,
) -> None:
    """Annotate the texts in files with a pipeline's entities; run again, it goes on where it stopped."""
    with one_sentence():
        try:
            done = annotate(
                model, source, output, column, workers, cpus_per_worker, gpus_per_worker, address, max_chars, unit_rows
            )
        except KeyboardInterrupt:
            raise UserError("Stopped; the same command goes on from here.") from None
        if not done["rows"]:
            return msg.good(f"{output}: nothing left to do, {done['before']:,} rows are there.")
        bad = f" ({done['bad']:,} bad ones: {output / '_bad'})" if done["bad"] else ""
        rate = f"{done['rows'] / done['work']:,.1f} rows/s with {done['workers']} worker(s)"
        msg.good(f"{output}: {done['rows']:,} rows{bad}; {rate}; {done['seconds']:,.0f} s with start and end.")


if __name__ == "__main__":
    typer.run(main)
