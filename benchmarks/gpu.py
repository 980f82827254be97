"""What a GPU gives: speed of a model of xlm-roberta-base's shape beside other systems', and proof that training learns.

    python benchmarks/gpu.py --recipe hf_recipe.py --data FOLDER --encoder assets/encoder-small

Needs a CUDA device (--gpu-id -1 runs it all on the CPU, in an hour or more), requirements-gpu.txt and
requirements-dev.txt. The recipe is the script that benchmarks/accuracy.py compares with, the folder that of PAN-X.it,
the encoder the small pretrained one in assets/encoder-small (`spacy project run build-encoder`), whose wordpieces the
model of the other shape has too.

1. Words/s of the pipeline in float32 and bfloat16, of `transformers.pipeline` and of stock spacy-transformers, with a
   randomly initialised encoder of xlm-roberta-base's shape: speed does not depend on the weights.
2. Training with that encoder: sentences/s of `spacy train` and of the recipe.
3. The card's recipe with the small pretrained encoder: F1 after training on the GPU.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import srsly
import torch
import typer

from benchmarks import accuracy, speed
from benchmarks.xlmr_base_shape import build_encoder

ROOT = Path(__file__).resolve().parent.parent


def main(
    recipe: Annotated[Path, typer.Option(help="The reference's script", exists=True)],
    data: Annotated[Path, typer.Option(help="Folder of PAN-X.it", exists=True)],
    encoder: Annotated[Path, typer.Option(help="Folder of the small pretrained encoder", exists=True)],
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = 0,
    count: Annotated[int, typer.Option(help="Texts whose time is taken")] = 5000,
    rounds: Annotated[int, typer.Option(help="How often each system is timed")] = 5,
    sentences: Annotated[int, typer.Option(help="Training sentences whose time is taken")] = 1680,
) -> None:
    """Measure training and prediction on a GPU."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_encoder(folder / "base")
        # one update, at a rate that changes nothing: what is timed does not depend on the weights
        accuracy.SIZES |= {"train": 24, "validation": 24, "test": count}
        accuracy.prepare(folder / "project", data, folder / "base", gpu_id)
        command = [sys.executable, "-m", "spacy", "train", "training/config.cfg", "--output", folder / "trained"]
        command += ["--code", "scripts/train.py", "--training.max_steps", 1, "--training.eval_frequency", 1]
        accuracy.run([*command, "--gpu-id", gpu_id], folder / "train.log", folder / "project", threads)
        model, weights = folder / "trained" / "model-last", folder / "weights"
        speed.save_hugging_face(speed.spacy.load(model), weights)
        texts, gold = speed.read_test(folder / "project" / "corpus" / "test.spacy")
        batched = speed.best_batch_size(model, weights, texts[:count], threads, gpu_id)
        names = [*(n for n, precision in speed.OURS.items() if precision != "int8"), batched, speed.STOCK]
        speed.compare(names, model, weights, texts, gold, count, rounds, threads, gpu_id)
        speed.compare_training(recipe, data, folder / "base", rounds, threads, sentences, gpu_id)
        accuracy.SIZES |= {"train": 1680, "validation": 840, "test": 840}
        accuracy.prepare(folder / "card", data, encoder, gpu_id)
        seed = srsly.read_yaml(ROOT / "project.yml")["vars"]["seed"]
        scores = accuracy.run_project(folder / "card", folder / "card-trained", seed, {}, threads, gpu_id)
        print("\n" + ", ".join(f"{split} {score * 100:.2f}" for split, score in scores.items()))


if __name__ == "__main__":
    typer.run(main)
