"""Compares this project's F1 with a reference's on the same sentences, and with its own without each of its choices.

    python benchmarks/accuracy.py --recipe hf_recipe.py --data FOLDER --encoder assets/encoder-small

The recipe is a script that is started as `hf_recipe.py ENCODER --seed 42 --train 1680 --validation 840 --test 840`,
trains on those sentences of PAN-X.it and prints as its last line JSON with the F1 of its last weights: `f1` on the
validation sentences, `test_f1` on the test sentences. The project's own runs are `spacy train` and `spacy evaluate`
with project.yml's vars.

Each run's figures go to benchmarks/accuracy.jsonl as soon as it ends. A run that is there already, of the same code,
encoder and sentences, is not repeated, so that an interrupted comparison goes on where it was. At the end both tables
are printed as Markdown.
"""

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import threading
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

from benchmarks import ablations  # noqa: F401  makes scripts/ importable and registers what a run without a choice is made of
from scripts.evaluate import score_raw_text

ROOT = Path(__file__).resolve().parent.parent
REFERENCE, PROJECT = "reference", "this project"
SIZES = {"train": 1680, "validation": 840, "test": 840}
# the scripts that a run's figures depend on
DECISIVE = (
    "panx",
    "convert",
    "configure",
    "train",
    *(f"pipeline/{name}" for name in ("encoder", "tokenizer", "token_ner")),
)
VARS = ("learning_rate", "head_learning_rate_scale", "batch_size", "epochs")
# what a run without the choice is given in its place, as `spacy train` takes it
CHOICES = {
    "learned transitions between tags (CRF); without: each token's cross-entropy": {
        "components.ner.factory": "softmax_ner"
    },
    "head's rate × 60; without: × 1": {"training.optimizer.head_learning_rate_scale": 1},
    "no dropout in the encoder; without: 0.1": {
        "components.transformer.model.transformer_config.hidden_dropout_prob": 0.1,
        "components.transformer.model.transformer_config.attention_probs_dropout_prob": 0.1,
    },
    "quotes cut off training words; without: as PAN-X glues them": {
        "corpora.train.augmenter.@augmenters": "panx_xlmr.PanxWords.v1"
    },
}


class Runs:
    """The runs' figures, kept in a JSONL file: one row a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.rows = list(srsly.read_jsonl(path)) if path.exists() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The row of the run with that key, None where there is none."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, on disk too."""
        with self.lock:
            self.rows.append(row)
            srsly.write_jsonl(self.path, [row], append=True, append_new_line=False)


def digest(paths: Iterable[Path]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the files' contents."""
    sha256 = hashlib.sha256()
    for path in sorted(paths):
        sha256.update(path.read_bytes())
    return sha256.hexdigest()[:16]


def run(command: Sequence[object], log: Path, cwd: Path, threads: int) -> str:
    """Runs a command, its output to `log`, and returns that. Raises RuntimeError where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf8") as stream:
        done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, stdout=stream, stderr=stream)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed; {log} says why")
    return log.read_text(encoding="utf8")


def prepare(folder: Path, data: Path, encoder: Path, gpu_id: int = -1) -> None:
    """A copy of the project in `folder` with the corpus and the config of the comparison."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "project.yml", folder)
    settings = {"gpu_id": gpu_id, "dataset": data.resolve(), "encoder": encoder.resolve()}
    settings |= {f"{split}_size": SIZES[name] for split, name in zip(("train", "dev", "test"), SIZES, strict=True)}
    overrides = [part for key, value in settings.items() for part in (f"--vars.{key}", value)]
    for command in ("download", "convert", "configure"):
        spacy = [sys.executable, "-m", "spacy", "project", "run", command, ".", *overrides]
        run(spacy, folder / f"{command}.log", folder, torch.get_num_threads())


def run_project(
    folder: Path, output: Path, seed: int, changes: dict[str, Any], threads: int, gpu_id: int = -1
) -> dict[str, float]:
    """F1, as fractions, of one training with that seed and those changes to the config."""
    output.mkdir(parents=True)
    settings = {
        "system.seed": seed,
        "training.logger.output_file": output / "training.jsonl",
        "training.logger.plot_file": output / "training.png",
        **changes,
    }
    overrides = [part for key, value in settings.items() for part in (f"--{key}", value)]
    code = ROOT / "benchmarks" / "ablations.py"
    spacy = [sys.executable, "-m", "spacy"]
    train = [*spacy, "train", "training/config.cfg", "--code", code, "--output", output, "--gpu-id", gpu_id, *overrides]
    run(train, output / "train.log", folder, threads)
    test = [*spacy, "evaluate", output / "model-last", "corpus/test.spacy", "--code", code, "--gold-preproc"]
    run([*test, "--output", output / "test.json"], output / "test.log", folder, threads)
    gold_tokens = srsly.read_json(output / "test.json")["ents_f"]
    nlp = load(output / "model-last")
    gold = [example.reference for example in Corpus(folder / "corpus" / "test.spacy", gold_preproc=True)(nlp)]
    raw_text = score_raw_text(nlp, gold)["ents_f"]
    validation = list(srsly.read_jsonl(output / "training.jsonl"))[-1]["ents_f"]
    shutil.rmtree(output / "model-last")
    shutil.rmtree(output / "model-best", ignore_errors=True)
    return {"validation": validation, "test": gold_tokens, "raw_text": raw_text}


def run_reference(recipe: Path, encoder: Path, output: Path, seed: int, threads: int) -> dict[str, float]:
    """F1, as fractions, of the reference with that seed."""
    output.mkdir(parents=True)
    sizes = [part for split, size in SIZES.items() for part in (f"--{split}", size)]
    command = [sys.executable, recipe.resolve(), encoder.resolve(), "--seed", seed, *sizes]
    printed = run(command, output / "recipe.log", output, threads)
    figures = srsly.json_loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))
    return {"validation": figures["f1"], "test": figures["test_f1"]}


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of fractions, in percent."""
    spread = f" ± {statistics.stdev(values) * 100:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) * 100:.2f}{spread}"


def tables(rows: Sequence[dict[str, Any]], seeds: Sequence[int], choice_seeds: Sequence[int]) -> str:
    """Both tables in Markdown: the systems seed by seed, and what each choice gains in the mean."""

    def of(system: str, seed: int) -> dict[str, Any]:
        return next(row for row in rows if row["system"] == system and row["seed"] == seed)

    lines = ["| F1, percent | sentences | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean ± sd |"]
    lines.append("|---" * (len(seeds) + 3) + "|")
    for system in (REFERENCE, PROJECT):
        for key in ("validation", "test", "raw_text"):
            if key in of(system, seeds[0]):
                values = [of(system, seed)[key] for seed in seeds]
                cells = [f"{value * 100:.2f}" for value in values]
                lines.append(
                    f"| {system} | {key.replace('_', ' ')} | {' | '.join(cells)} | {mean_and_spread(values)} |"
                )
    keys = ("validation", "test", "raw_text")
    lines += ["", f"Means over the seeds {', '.join(map(str, choice_seeds))}.", ""]
    lines += ["| without the choice | validation | test | raw text | gain: validation | test | raw text |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for choice in CHOICES:
        cells, gains = [], []
        for key in keys:
            without = [of(choice, seed)[key] for seed in choice_seeds]
            differences = [of(PROJECT, seed)[key] - value for seed, value in zip(choice_seeds, without, strict=True)]
            cells.append(f"{statistics.mean(without) * 100:.2f}")
            gains.append(f"{'+' if statistics.mean(differences) > 0 else ''}{mean_and_spread(differences)}")
        lines.append(f"| {choice} | {' | '.join(cells)} | {' | '.join(gains)} |")
    return "\n".join(lines)


def main(
    recipe: Annotated[Path, typer.Option(help="The reference's script", exists=True)],
    data: Annotated[Path, typer.Option(help="Folder of PAN-X.it", exists=True)],
    encoder: Annotated[Path, typer.Option(help="Folder of the encoder", exists=True)],
    seed: Annotated[list[int], typer.Option(help="Seeds of both systems")] = [42, 1, 2, 3, 4],  # noqa: B006
    choice_seed: Annotated[list[int], typer.Option(help="Seeds of the runs without a choice")] = [42, 1, 2],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Runs at a time, which share the cores")] = 1,
    output: Annotated[Path, typer.Option(help="Where the figures go")] = ROOT / "benchmarks" / "accuracy.jsonl",
) -> None:
    """Compare the project with a reference, and with itself without each of its choices."""
    output.parent.mkdir(parents=True, exist_ok=True)
    runs = Runs(output)
    work = ROOT / "build" / "accuracy"
    sources = [*(ROOT / "scripts" / f"{name}.py" for name in DECISIVE), ROOT / "configs" / "xlmr.cfg"]
    variables = srsly.read_yaml(ROOT / "project.yml")["vars"]
    same = {
        "sentences": digest(data.glob("*.tsv")),
        "encoder": digest(encoder.glob("*.safetensors")),
        **{f"{split}_sentences": size for split, size in SIZES.items()},
        **{name: variables[name] for name in VARS},
    }
    code = {REFERENCE: digest([recipe]), PROJECT: digest([*sources, ROOT / "benchmarks" / "ablations.py"])}
    wanted = [(system, number) for number in seed for system in (REFERENCE, PROJECT)]
    wanted += [(PROJECT, number) for number in choice_seed if number not in seed]
    wanted += [(choice, number) for number in choice_seed for choice in CHOICES]
    keys = [
        {"system": system, "seed": number, "code": code.get(system, code[PROJECT]), **same} for system, number in wanted
    ]
    threads = max(1, torch.get_num_threads() // jobs)
    prepare(work / "project", data, encoder)

    def measure(key: dict[str, Any]) -> dict[str, Any]:
        row = runs.find(key)
        if row is None:
            system, number = key["system"], key["seed"]
            folder = work / f"{list(dict.fromkeys(s for s, _ in wanted)).index(system)}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            if system == REFERENCE:
                scores = run_reference(recipe, encoder, folder, number, threads)
            else:
                scores = run_project(work / "project", folder, number, CHOICES.get(system, {}), threads)
            row = key | scores
            runs.add(row)
        figures = ", ".join(f"{k} {row[k] * 100:.2f}" for k in ("validation", "test", "raw_text") if k in row)
        msg.good(f"{key['system']}, seed {key['seed']}: {figures}")
        return row

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(measure, keys))
    print(tables(rows, seed, choice_seed))


if __name__ == "__main__":
    typer.run(main)
