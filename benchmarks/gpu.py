"""Measure training and prediction on a GPU.

    python -m benchmarks.gpu --data FOLDER --encoder assets/encoder-small

Needs a CUDA device, requirements-gpu.txt and requirements-dev.txt; `--gpu-id -1` runs it on the CPU in an hour or more.
`spacy project run build-encoder` makes the encoder, a small pretrained one.
Speed does not depend on the weights, so the first two measurements use a randomly initialised encoder in the shape of
xlm-roberta-base, with the wordpieces of the small one.

1. Prediction: words/s of the pipeline in float32 and bfloat16, `transformers.pipeline` and stock spacy-transformers.
2. Training: sentences/s of this project and of the card's recipe.
3. Accuracy: F1 of this project after training on the GPU with the small encoder.
"""

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
    data: Annotated[Path, typer.Option(help="Folder of PAN-X.it as TSV files", exists=True)],
    encoder: Annotated[Path, typer.Option(help="Folder of the small pretrained encoder", exists=True)],
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = 0,
    count: Annotated[int, typer.Option(help="Texts to time")] = 5000,
    rounds: Annotated[int, typer.Option(help="Rounds of timing")] = 5,
    sentences: Annotated[int, typer.Option(help="Training sentences to time")] = 1680,
) -> None:
    """Measure training and prediction on a GPU."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_encoder(folder / "base")
        sizes = {"train": 24, "validation": 24, "test": count}
        accuracy.prepare(folder / "project", data, folder / "base", sizes, gpu_id)
        one_step = {"training.max_steps": 1, "training.eval_frequency": 1}
        train = accuracy.train_command(folder / "trained", gpu_id, one_step)
        accuracy.run(train, folder / "train.log", folder / "project", threads)
        model, weights = folder / "trained" / "model-last", folder / "weights"
        speed.save_hugging_face(speed.spacy.load(model), weights)
        texts, gold = speed.read_test(folder / "project" / "corpus" / "test.spacy")
        batched = speed.best_batch_size(model, weights, texts[:count], threads, gpu_id)
        names = [*(n for n, precision in speed.OURS.items() if precision != "int8"), batched, speed.STOCK]
        speed.compare(names, model, weights, texts, gold, count, rounds, threads, gpu_id)
        speed.compare_training(data, folder / "base", rounds, threads, sentences, gpu_id)
        accuracy.prepare(folder / "card", data, encoder, accuracy.SIZES, gpu_id)
        seed = srsly.read_yaml(ROOT / "project.yml")["vars"]["seed"]
        scores = accuracy.run_project(folder / "card", folder / "card-trained", seed, {}, threads, gpu_id)
        print("\n" + ", ".join(f"{split} {score * 100:.2f}" for split, score in scores.items()))


if __name__ == "__main__":
    typer.run(main)
