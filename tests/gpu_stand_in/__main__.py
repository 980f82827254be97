"""Run the project on the stand-in: python -m gpu_stand_in ENCODER FOLDER writes FOLDER/results.json."""

import os
import sys
from pathlib import Path
from typing import Any

import gpu_stand_in
from gpu_stand_in import AUTOCAST, COUNTS, KERNEL, SYNC, TO_DEVICE, counted

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
gpu_stand_in.install()

import numpy  # noqa: E402
import spacy  # noqa: E402
import srsly  # noqa: E402
import torch  # noqa: E402
from spacy.cli.train import train  # noqa: E402
from spacy.language import Language  # noqa: E402
from spacy.training import Corpus, Example  # noqa: E402
from spacy.training.initialize import init_nlp  # noqa: E402
from thinc.api import Config, use_ops  # noqa: E402

from benchmarks import gpu_check  # noqa: E402
from scripts import configure, convert, evaluate, slim  # noqa: E402
from scripts.pipeline import encoder as layer  # noqa: E402

RESULTS: dict[str, Any] = {"autocast in prediction": 0, "predictions": 0}
SENTENCES = 24


def watch_predictions() -> None:
    """Count autocast's casts during prediction on the device."""
    predict = layer.TransformerShim.predict

    def watched(self: layer.TransformerShim, windows: Any) -> torch.Tensor:
        before = counted(AUTOCAST)
        vectors = predict(self, windows)
        RESULTS["autocast in prediction"] += counted(AUTOCAST) - before
        RESULTS["predictions"] += vectors.is_cuda
        return vectors

    layer.TransformerShim.predict = watched


def refused() -> list[str]:
    """Return what CuPy and PyTorch would refuse on a GPU, and the stand-in computes."""
    import cupy

    array, host, tensor = cupy.zeros((2, 2)), numpy.zeros((2, 2)), torch.zeros((2, 2), device="cuda")
    computed = []
    for name, operation in {
        "CuPy + NumPy": lambda: array + host,
        "NumPy + CuPy": lambda: host + array,
        "NumPy from CuPy": lambda: numpy.asarray(array),
        "CuPy from NumPy arrays": lambda: cupy.concatenate([host, host]),
        "CuPy filled from NumPy": lambda: array.__setitem__(slice(None), host),
        "cuda + cpu": lambda: tensor + torch.zeros((2, 2)),
        "cpu @ cuda": lambda: torch.zeros((2, 2)) @ tensor,
        "NumPy from cuda": lambda: tensor.numpy(),
    }.items():
        try:
            operation()
        except (TypeError, RuntimeError):
            continue
        computed.append(name)
    return computed


def config_for(encoder: Path, folder: Path, gpu_id: int, epochs: int = 1) -> Config:
    """Return a config with which the tiny encoder learns SENTENCES sentences by heart."""
    settings = gpu_check.SETTINGS | {"learning_rate": 2e-3, "head_learning_rate_scale": 2, "encoder": encoder}
    settings |= {"sentences": SENTENCES, "batch_size": SENTENCES, "epochs": epochs}
    config = configure.configure(Path("configs/xlmr.cfg"), **settings, gpu_id=gpu_id)
    config["paths"] |= {"train": str(folder / "train.spacy"), "dev": str(folder / "train.spacy")}
    files = {"output_file": str(folder / "training.jsonl"), "plot_file": str(folder / "training.png")}
    config["training"]["logger"] |= files
    config["training"]["eval_frequency"] = config["training"]["max_steps"]
    return config


def pipeline(encoder: Path, folder: Path) -> tuple[Language, list[Example]]:
    """Return an untrained pipeline in mixed precision on the device, and the sentences."""
    nlp = init_nlp(config_for(encoder, folder, 0), use_gpu=0)
    return nlp, list(Corpus(folder / "train.spacy", gold_preproc=True)(nlp))


def counts_of_a_step(encoder: Path, folder: Path) -> dict[str, int]:
    """Return what the second update in mixed precision asks of the device; the first one prepares the optimizer."""
    nlp, examples = pipeline(encoder, folder)
    optimizer = nlp.resume_training()
    for _ in range(2):
        COUNTS.clear()
        nlp.update(examples, drop=0.1, sgd=False)
        gpu_check.update(nlp, optimizer)
    return {
        "kernels": counted(KERNEL),
        "kernels of the CRF": counted(KERNEL, "scripts.pipeline.token_ner"),
        "copies to the device": counted(TO_DEVICE),
        "our syncs": counted(SYNC, "scripts"),
    }


def accumulation_error(encoder: Path, folder: Path) -> float:
    """Return how far the gradient of a batch, taken twice, is from twice its gradient, relative to its norm."""
    nlp, examples = pipeline(encoder, folder)
    found: list[torch.Tensor] = []

    class Recorder:
        def update_encoder(self, key: int, parameters: Any, table: torch.Tensor, read: Any) -> None:
            gradients = [p.grad for _, p in parameters] + [gradient for _, gradient in read[:1]]
            gradients[-1] = sum(gradient for _, gradient in read)
            found.append(torch.cat([gradient.host.flatten() for gradient in gradients]))

    for times in (1, 2):
        for _ in range(times):
            nlp.update(examples, drop=0.0, sgd=False)
        nlp.get_pipe("transformer").model.layers[0].shims[0].finish_update(Recorder())
    once, twice = found
    return float((twice - 2 * once).norm() / (2 * once).norm())


def main(encoder: Path, folder: Path) -> None:
    RESULTS["computed though a GPU refuses it"] = refused()
    watch_predictions()
    convert.main(Path("corpus/sample"), folder, train_size=SENTENCES, dev_size=12, test_size=12)
    # a pipeline that finds entities, trained on the CPU
    config_for(encoder, folder, -1, epochs=40).to_disk(folder / "cpu.cfg")
    train(folder / "cpu.cfg", folder / "cpu", use_gpu=-1)
    for device, gpu_id in (("cpu", -1), ("cuda", 0)):
        with use_ops("cpu"):
            small, train_file = folder / device / "slim", folder / "train.spacy"
            options = (Path("corpus/sample"), train_file, [train_file], "it", 400, 8, gpu_id)
            slim.main(folder / "cpu" / "model-last", small, True, *options)
            evaluate.main(str(small), train_file, output=folder / device, gpu_id=gpu_id)
            RESULTS[device] = {
                "temperature": srsly.read_json(small / "ner" / "cfg")["temperature"],
                "raw text": srsly.read_json(folder / device / "raw_text.json"),
            }
    # `spacy train` as `spacy project run train` calls it on a GPU
    spacy.require_gpu(0)
    config_for(encoder, folder, 0, epochs=2).to_disk(folder / "cuda.cfg")
    train(folder / "cuda.cfg", folder / "trained", use_gpu=0)
    RESULTS["training"] = list(srsly.read_jsonl(folder / "training.jsonl"))
    RESULTS["step"] = counts_of_a_step(encoder, folder)
    RESULTS["accumulation error"] = accumulation_error(encoder, folder)
    gpu_check.main(0, encoder, 2 * SENTENCES, folder / "gpu_check.json")
    RESULTS["gpu_check"] = srsly.read_json(folder / "gpu_check.json")["checks"]
    srsly.write_json(folder / "results.json", RESULTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
