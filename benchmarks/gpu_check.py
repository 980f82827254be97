"""Check that a GPU computes what the CPU computes, in a few minutes: `python -m benchmarks.gpu_check`.

After PyTorch, CuPy and memory, it trains one epoch on the sample corpus with the small encoder: on the CPU, on the
GPU in float32, and on the GPU in mixed precision. There is no dropout, so that the losses can be compared.
"""

import platform
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy
import spacy
import srsly
import torch
import typer
from spacy.language import Language
from spacy.schemas import ConfigSchemaTraining
from spacy.training import Corpus
from spacy.training.initialize import init_nlp
from spacy.util import minibatch, registry
from thinc.api import Optimizer, get_ops, set_current_ops, torch2xp, xp2torch
from wasabi import msg

from scripts import build_encoder, convert
from scripts.check import GB, check_cupy, check_pytorch
from scripts.common import UserError, one_sentence, replacing
from scripts.configure import configure
from scripts.download import reason
from scripts.evaluate import entities_of

SMALL = Path("assets/encoder-small")
# chosen so that a pipeline finds entities after one epoch of the sample corpus
SETTINGS = {"lang": "it", "learning_rate": 1e-4, "head_learning_rate_scale": 60, "batch_size": 8, "seed": 42}
UPDATES = 20  # whose losses are compared
# largest differences of a loss (nats per word) and of F1
LIMITS = {"float32": (0.005, 0.05), "mixed precision": (0.1, 0.05)}
NEED = 5  # GB for xlm-roberta-base, estimated from its weights, gradients, moments and activations, not measured
ADVICE = "run `make venv-gpu` in a new clone; if that does not help, use the CPU and report it with the JSON file"


class Trained(NamedTuple):
    """A pipeline after one epoch, and how the training went."""

    nlp: Language
    losses: numpy.ndarray  # of each update, in nats per word
    f1: float
    speed: float  # sentences a second, in the median update


def use(gpu_id: int) -> None:
    """Let thinc compute on a GPU, or on the CPU if `gpu_id` is -1."""
    set_current_ops(get_ops("cpu"))
    if gpu_id >= 0:
        spacy.require_gpu(gpu_id)
        torch.cuda.reset_peak_memory_stats(gpu_id)


def peak(gpu_id: int) -> str:
    return f"peak memory {torch.cuda.max_memory_allocated(gpu_id) / GB:.1f} GB"


def check_memory(gpu_id: int) -> str:
    """Raise UserError if too little of the GPU's memory is free for xlm-roberta-base."""
    free, total = (size / GB for size in torch.cuda.mem_get_info(gpu_id))
    if free < NEED:
        raise UserError(f"{free:.1f} of {total:.1f} GB are free, about {NEED} GB needed; end what `nvidia-smi` lists.")
    return f"{free:.1f} of {total:.1f} GB are free"


def check_shared_memory(gpu_id: int) -> str:
    """Raise AssertionError unless PyTorch and CuPy read and write the same memory, in both directions."""
    use(gpu_id)
    array = get_ops("cupy").asarray(numpy.arange(6, dtype="float32").reshape(2, 3))
    tensor = xp2torch(array)
    tensor += 1
    assert array.get().tolist() == [[1, 2, 3], [4, 5, 6]], "CuPy does not see what PyTorch wrote"
    columns = torch2xp(tensor[:, 1:])
    columns *= 2
    assert tensor.tolist() == [[1, 4, 6], [4, 10, 12]], "PyTorch does not see what CuPy wrote"
    return "PyTorch and CuPy share it"


def update(nlp: Language, optimizer: Optimizer) -> None:
    """Update all pipes after the last one's backward pass, as `spacy train` does."""
    for pipe in (nlp.get_pipe("transformer"), nlp.get_pipe("ner")):
        pipe.finish_update(optimizer)
    optimizer.step_schedules()


def train(folder: Path, encoder: Path, sentences: int, gpu_id: int, mixed: bool) -> Trained:
    """Train one epoch without dropout, in the order of the file."""
    use(gpu_id)
    settings = SETTINGS | {"encoder": encoder, "sentences": sentences, "epochs": 1}
    config = configure(Path("configs/xlmr.cfg"), **settings, gpu_id=gpu_id)
    config["paths"] |= {split: str(folder / f"{split}.spacy") for split in ("train", "dev")}
    config["components"]["transformer"]["model"]["mixed_precision"] = mixed
    nlp = init_nlp(config, use_gpu=gpu_id)
    optimizer = registry.resolve(config.interpolate()["training"], schema=ConfigSchemaTraining)["optimizer"]
    rows, seconds = [], []
    for batch in minibatch(Corpus(folder / "train.spacy", gold_preproc=True)(nlp), SETTINGS["batch_size"]):
        start, losses = time.perf_counter(), {}
        nlp.update(batch, drop=0.0, sgd=False, losses=losses)
        update(nlp, optimizer)
        rows.append(losses["ner"])
        seconds.append((time.perf_counter() - start) / len(batch))
    f1 = nlp.evaluate(list(Corpus(folder / "dev.spacy", gold_preproc=True)(nlp)))["ents_f"]
    return Trained(nlp, numpy.array(rows), f1, float(1 / numpy.median(seconds)))


def check_training(known: Trained, precision: str, folder: Path, encoder: Path, sentences: int, gpu_id: int) -> str:
    """Raise AssertionError unless the training on the GPU goes as on the CPU."""
    trained = train(folder, encoder, sentences, gpu_id, precision != "float32")
    assert trained.nlp.get_pipe("transformer").model.transformer.device.type == "cuda", "the transformer is on the CPU"
    most, band = LIMITS[precision]
    differences = abs(trained.losses - known.losses)[:UPDATES]
    said = f"losses differ by at most {differences.max():.1e} in {len(differences)} updates, F1 {trained.f1:.3f}"
    assert differences.max() <= most and abs(trained.f1 - known.f1) <= band, said
    return f"{said}, {trained.speed:.0f} sentences/s, {peak(gpu_id)}"


def check_prediction(known: Trained, folder: Path, gpu_id: int) -> str:
    """Raise AssertionError unless the pipeline that the CPU trained finds the same entities on the GPU."""
    use(-1)
    texts = [example.text for example in Corpus(folder / "dev.spacy")(known.nlp)] + ["", " ", "Vive a Roma. " * 200]
    expected = [entities_of(doc) for doc in known.nlp.pipe(texts)]
    known.nlp.to_disk(folder / "model")
    use(gpu_id)
    nlp = spacy.load(folder / "model")
    list(nlp.pipe(texts[:32]))  # compiles kernels
    start = time.perf_counter()
    found = [entities_of(doc) for doc in nlp.pipe(texts)]
    speed = len(texts) / (time.perf_counter() - start)
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    said = f"the CPU's entities ({sum(map(len, expected))}) in {same} of {len(texts)} texts"
    assert same >= 0.99 * len(texts), said
    return f"{said}, {speed:.0f} texts/s, {peak(gpu_id)}"


def check_all(gpu_id: int, encoder: Path, sentences: int) -> list[dict[str, Any]]:
    """Run the checks and print them; stop before the training unless everything that it needs works."""
    results: list[dict[str, Any]] = []

    def run(name: str, check: Callable[..., Any], *arguments: Any) -> Any:
        result = None
        try:
            result = check(*arguments)
            said = result if isinstance(result, str) else f"F1 {result.f1:.3f}, {result.speed:.0f} sentences/s"
        except UserError as error:
            said = str(error)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{reason(error)} ({type(error).__name__}, {Path(where.filename).name}:{where.lineno}); {ADVICE}"
        (msg.fail if result is None else msg.good)(f"{name}: {said}")
        results.append({"check": name, "ok": result is not None, "result": said})
        return result

    if not (run("GPU", check_pytorch, gpu_id) and run("CuPy", check_cupy, gpu_id)):
        return results
    run("Memory", check_memory, gpu_id)
    run("Shared memory", check_shared_memory, gpu_id)
    if encoder == SMALL and not encoder.exists():
        build_encoder.main(encoder, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stats = convert.main(Path("corpus/sample"), folder, train_size=sentences)
        training = folder, encoder, stats["train"]["sentences"]
        if known := run("Training on the CPU", train, *training, -1, False):
            for precision in LIMITS:
                run(f"Training on the GPU in {precision}", check_training, known, precision, *training, gpu_id)
            run("Prediction on the GPU", check_prediction, known, folder, gpu_id)
    return results


def main(
    gpu_id: Annotated[int, typer.Option(min=0, help="Number of the GPU")] = 0,
    encoder: Annotated[Path, typer.Option(help="Folder of an encoder; the small one is built if missing")] = SMALL,
    sentences: Annotated[int, typer.Option(min=0, help="Training sentences, 0 for all of corpus/sample")] = 0,
    output: Annotated[Path, typer.Option(help="File for the results")] = Path("gpu_check.json"),
) -> None:
    """Check that a GPU computes what the CPU computes; write the results to a file to attach to a report."""
    with one_sentence():
        results = check_all(gpu_id, encoder, sentences)
        system = {"platform": platform.platform(), "python": platform.python_version(), "cuda": torch.version.cuda}
        system["packages"] = {package.name: package.version for package in metadata.distributions()}
        with replacing(output) as path:
            srsly.write_json(path, system | {"checks": results})
    failed = sum(not result["ok"] for result in results)
    msg.text(f"{len(results) - failed} of {len(results)} checks passed; {output} has the details for a report.")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
