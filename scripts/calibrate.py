"""Find the temperature at which `span._.panx_score` says how often such an entity is right."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy
import srsly
import typer
from scipy.optimize import minimize_scalar
from spacy.language import Language
from spacy.training import Corpus, Example
from spacy.util import minibatch
from wasabi import msg

from scripts.common import UserError, link_or_copy, one_sentence, replacing
from scripts.evaluate import calibration_bins, expected_calibration_error, scored_entities
from scripts.pipeline import load_pipeline
from scripts.train import annotate_until

BOUNDS = (0.25, 8.0)


def find_temperature(nlp: Language, examples: Sequence[Example]) -> tuple[float, float, float]:
    """Return (temperature, calibration error before, after) and leave the pipe `ner` with that temperature.

    The temperature minimizes the log loss of all entities found in the gold tokens (Guo et al. 2017), whatever the
    pipe's threshold. Raises UserError if the pipeline finds no entity.
    """
    ner = nlp.get_pipe("ner")
    threshold, ner.threshold = ner.threshold, 0.0
    gold, docs, batches = [example.reference for example in examples], [], []
    for batch in minibatch([example.predicted for example in examples], 64):
        batch = annotate_until(nlp, batch, "ner")
        batches.append((batch, ner.predict(batch)))
        docs += batch
        for doc in batch:
            if doc.has_extension("trf_data"):
                doc._.trf_data = None

    def annotate(temperature: float) -> None:
        ner.cfg["temperature"] = temperature
        for batch, scores in batches:
            for doc in batch:
                doc.set_ents([], default="missing")
            ner.set_annotations(batch, scores)

    def log_loss(temperature: float) -> float:
        annotate(temperature)
        scores, right = scored_entities(gold, docs)
        scores = scores.clip(1e-6, 1 - 1e-6)
        return float(-numpy.where(right, numpy.log(scores), numpy.log(1 - scores)).mean())

    def error() -> float:
        return expected_calibration_error(calibration_bins(gold, docs))

    annotate(1.0)
    if not any(doc.ents for doc in docs):
        raise UserError(
            "The pipeline finds no entity in the validation sentences; train on more sentences or for longer "
            "(--vars.train_size, --vars.epochs)."
        )
    before = error()
    temperature = round(float(minimize_scalar(log_loss, bounds=BOUNDS, method="bounded").x), 3)
    annotate(temperature)
    after, ner.threshold = error(), threshold
    return temperature, before, after


def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for the calibrated pipeline", show_default=False)],
    corpus: Annotated[list[Path], typer.Option(help="Validation texts (.spacy); a missing file is skipped")],
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = -1,
) -> None:
    """Calibrate the probabilities of entities on the validation texts."""
    with one_sentence():
        nlp = load_pipeline(model, gpu_id)
        examples = [e for path in corpus if path.exists() for e in Corpus(path, gold_preproc=True)(nlp)]
        temperature, before, after = find_temperature(nlp, examples)
        with replacing(output) as folder:
            shutil.copytree(model, folder, copy_function=link_or_copy)
            # not written through the link: it is the other pipeline's file
            (folder / "ner" / "cfg").unlink()
            srsly.write_json(folder / "ner" / "cfg", nlp.get_pipe("ner").cfg)
        msg.good(
            f"{output}: temperature {temperature}; calibration error on the validation texts {after * 100:.1f} "
            f"points instead of {before * 100:.1f}"
        )


if __name__ == "__main__":
    typer.run(main)
