"""Compare this project's F1 with the model card's recipe on the same sentences, and with itself without each choice.

    python -m benchmarks.accuracy --data FOLDER --encoder assets/encoder-small

The baseline is benchmarks/recipe.py. This project's runs are `spacy train` and `spacy evaluate` with the variables of
project.yml. Each run adds a row to benchmarks/accuracy.jsonl when it ends. A run whose row is there for the same code,
encoder and sentences is skipped, so an interrupted comparison resumes. At the end both tables are printed as Markdown.
"""

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import srsly
import torch
import typer
from spacy import load
from spacy.training import Corpus
from wasabi import msg

import benchmarks.ablations  # noqa: F401  registers what a pipeline without a choice is loaded with
from scripts.evaluate import score_raw_text

ROOT = Path(__file__).resolve().parent.parent
BASELINE, PROJECT = "the card's recipe", "this project"
# sentences of each split
SIZES = {"train": 1680, "validation": 840, "test": 840}
# what the figures of this project's runs depend on
SOURCES = [
    *(ROOT / "scripts" / f"{name}.py" for name in ("panx", "convert", "running", "configure", "train", "evaluate")),
    *(ROOT / "scripts" / "pipeline").glob("*.py"),
    ROOT / "configs" / "xlmr.cfg",
    ROOT / "benchmarks" / "ablations.py",
]
VARS = ("learning_rate", "head_learning_rate_scale", "batch_size", "epochs")
VARS += ("running_times", "encoder_dropout", "letter_case", "threshold")
SCORES = ("validation", "test", "raw_text")
# the overrides of `spacy train` that undo each choice
CHOICES = {
    "learned transitions between tags (CRF); without: each token's cross-entropy": {
        "components.ner.factory": "softmax_ner"
    },
    "head's learning rate × 60; without: × 1": {"training.optimizer.head_learning_rate_scale": 1},
    "no dropout in the encoder; without: 0.1": {
        "components.transformer.model.transformer_config.hidden_dropout_prob": 0.1
    },
}


def digest(paths: Iterable[Path]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the files' contents."""
    sha256 = hashlib.sha256()
    for path in sorted(paths):
        sha256.update(path.read_bytes())
    return sha256.hexdigest()[:16]


def run(command: Sequence[object], log: Path, cwd: Path, threads: int) -> tuple[float, float]:
    """Run a command with its output in `log`; return its seconds and its peak memory in GB.

    Raises RuntimeError if the command fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with log.open("w", encoding="utf8") as stream:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=cwd, env=environment, stdout=stream, stderr=stream
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed; {log} says why:\n{log.read_text('utf8')[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def as_options(values: dict[str, object]) -> list[object]:
    """Return the values as command-line options."""
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def recipe_command(data: Path, encoder: Path, gpu_id: int, options: dict[str, object]) -> list[object]:
    """Return the command of the card's recipe, to be run in ROOT. gpu_id: -1 for the CPU."""
    python = ["env", f"CUDA_VISIBLE_DEVICES={gpu_id}", sys.executable]  # the recipe takes any GPU it sees
    paths = {"data": data.resolve(), "encoder": encoder.resolve()}
    return [*python, "-m", "benchmarks.recipe", *as_options(paths | options)]


def train_command(output: Path, gpu_id: int, overrides: dict[str, object]) -> list[object]:
    """Return the command that trains this project, to be run in a folder that `prepare` made."""
    paths = {"code": ROOT / "benchmarks" / "ablations.py", "output": output}
    spacy = [sys.executable, "-m", "spacy", "train", "training/config.cfg"]
    return [*spacy, *as_options(paths | {"gpu-id": gpu_id} | overrides)]


def copy_project(
    target: Path, source: Path = ROOT, further: Sequence[str] = ("corpus/running", "corpus/sample")
) -> Path:
    """Copy a project without what its commands have made; return the copy. further: what it needs besides its code."""
    for name in ("project.yml", "LICENSE", "configs", "scripts", *further):
        path = source / name
        target.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target / name)
    return target


def prepare(folder: Path, data: Path, encoder: Path, sizes: dict[str, int], gpu_id: int = -1) -> None:
    """Copy the project to `folder` and make its corpus and its training config there."""
    shutil.rmtree(folder, ignore_errors=True)
    copy_project(folder)
    settings: dict[str, object] = {
        "vars.gpu_id": gpu_id,
        "vars.dataset": data.resolve(),
        "vars.encoder": encoder.resolve(),
        "vars.train_size": sizes["train"],
        "vars.dev_size": sizes["validation"],
        "vars.test_size": sizes["test"],
    }
    for name in ("download", "convert", "configure"):
        command = [sys.executable, "-m", "spacy", "project", "run", name, ".", *as_options(settings)]
        run(command, folder / f"{name}.log", folder, torch.get_num_threads())


def run_project(
    folder: Path, output: Path, seed: int, changes: dict[str, object], threads: int, gpu_id: int = -1
) -> dict[str, float]:
    """Train with a seed and changes to the config; return F1 as fractions."""
    output.mkdir(parents=True)
    figures, plot = output / "training.jsonl", output / "training.png"
    logger = {"training.logger.output_file": figures, "training.logger.plot_file": plot}
    train = train_command(output, gpu_id, {"system.seed": seed} | logger | changes)
    run(train, output / "train.log", folder, threads)
    code = ROOT / "benchmarks" / "ablations.py"
    test = [sys.executable, "-m", "spacy", "evaluate", output / "model-last", "corpus/test.spacy", "--gold-preproc"]
    test += ["--code", code, "--output", output / "test.json"]
    run(test, output / "test.log", folder, threads)
    nlp = load(output / "model-last")
    gold = [example.reference for example in Corpus(folder / "corpus" / "test.spacy", gold_preproc=True)(nlp)]
    raw_text = score_raw_text(nlp, gold)["ents_f"]
    for name in ("model-last", "model-best"):
        shutil.rmtree(output / name, ignore_errors=True)
    validation, test_scores = list(srsly.read_jsonl(figures))[-1], srsly.read_json(output / "test.json")
    return {"validation": validation["ents_f"], "test": test_scores["ents_f"], "raw_text": raw_text}


def run_recipe(data: Path, encoder: Path, output: Path, seed: int, threads: int) -> dict[str, float]:
    """Train the card's recipe with a seed; return F1 as fractions."""
    output.mkdir(parents=True)
    log = output / "recipe.log"
    run(recipe_command(data, encoder, -1, {"seed": seed} | SIZES), log, ROOT, threads)
    figures = srsly.json_loads(log.read_text(encoding="utf8").splitlines()[-1])
    return {"validation": figures["f1"], "test": figures["test_f1"]}


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean and the sample standard deviation of fractions in percent."""
    spread = f" ± {statistics.stdev(values) * 100:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) * 100:.2f}{spread}"


def tables(rows: Sequence[dict[str, Any]], seeds: Sequence[int], choice_seeds: Sequence[int]) -> str:
    """Return two tables in Markdown: each system's F1 for each seed, and what each choice gains on average."""
    row_of = {(row["system"], row["seed"]): row for row in rows}
    lines = ["| F1, percent | sentences | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean ± sd |"]
    lines.append("|---" * (len(seeds) + 3) + "|")
    for system in (BASELINE, PROJECT):
        for key in SCORES:
            if key in row_of[system, seeds[0]]:
                values = [row_of[system, seed][key] for seed in seeds]
                cells = [*(f"{value * 100:.2f}" for value in values), mean_and_spread(values)]
                lines.append(f"| {system} | {key.replace('_', ' ')} | {' | '.join(cells)} |")
    lines += ["", f"Means over the seeds {', '.join(map(str, choice_seeds))}.", ""]
    lines += ["| without the choice | validation | test | raw text | gain: validation | test | raw text |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for choice in CHOICES:
        cells, gains = [], []
        for key in SCORES:
            without = [row_of[choice, seed][key] for seed in choice_seeds]
            differences = [row_of[PROJECT, seed][key] - f1 for seed, f1 in zip(choice_seeds, without, strict=True)]
            cells.append(f"{statistics.mean(without) * 100:.2f}")
            gains.append(f"{'+' if statistics.mean(differences) > 0 else ''}{mean_and_spread(differences)}")
        lines.append(f"| {choice} | {' | '.join(cells + gains)} |")
    return "\n".join(lines)


def main(
    data: Annotated[Path, typer.Option(help="Folder of PAN-X.it as TSV files", exists=True)],
    encoder: Annotated[Path, typer.Option(help="Folder of the encoder", exists=True)],
    seed: Annotated[list[int], typer.Option(help="Seeds of both systems")] = [42, 1, 2, 3, 4],  # noqa: B006
    choice_seed: Annotated[list[int], typer.Option(help="Seeds of the runs without a choice")] = [42, 1, 2],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Runs at the same time, which share the cores")] = 1,
    output: Annotated[Path, typer.Option(help="JSONL file of the figures")] = ROOT / "benchmarks" / "accuracy.jsonl",
) -> None:
    """Compare the project with the card's recipe, and with itself without each of its choices."""
    output.parent.mkdir(parents=True, exist_ok=True)
    known = list(srsly.read_jsonl(output)) if output.exists() else []
    lock = threading.Lock()
    work = ROOT / "build" / "accuracy"
    threads = max(1, torch.get_num_threads() // jobs)
    variables = srsly.read_yaml(ROOT / "project.yml")["vars"]
    same = {
        "sentences": digest(data.glob("*.tsv")),
        "encoder": digest(encoder.glob("*.safetensors")),
        **{f"{split}_sentences": size for split, size in SIZES.items()},
        **{name: variables[name] for name in VARS},
    }
    recipe_code = digest([ROOT / "benchmarks" / "recipe.py", ROOT / "scripts" / "panx.py"])
    project_code = digest(SOURCES)
    wanted = [(system, number) for number in seed for system in (BASELINE, PROJECT)]
    wanted += [(PROJECT, number) for number in choice_seed if number not in seed]
    wanted += [(choice, number) for number in choice_seed for choice in CHOICES]
    prepare(work / "project", data, encoder, SIZES)

    def measure(system: str, number: int) -> dict[str, Any]:
        code = recipe_code if system == BASELINE else project_code
        key = {"system": system, "seed": number, "code": code, **same}
        row = next((row for row in known if key.items() <= row.items()), None)
        if row is None:
            folder = work / f"{[BASELINE, PROJECT, *CHOICES].index(system)}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            if system == BASELINE:
                scores = run_recipe(data, encoder, folder, number, threads)
            else:
                scores = run_project(work / "project", folder, number, CHOICES.get(system, {}), threads)
            row = key | scores
            with lock:
                srsly.write_jsonl(output, [row], append=True, append_new_line=False)
        figures = ", ".join(f"{name} {row[name] * 100:.2f}" for name in SCORES if name in row)
        msg.good(f"{system}, seed {number}: {figures}")
        return row

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(measure, *zip(*wanted, strict=True)))
    print(tables(rows, seed, choice_seed))


if __name__ == "__main__":
    typer.run(main)
