"""Finds the temperature at which `span._.score` says how often such an entity is right."""

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
from wasabi import msg

from scripts.common import UserError, link_or_copy, one_sentence, replacing
from scripts.evaluate import calibration_bins, expected_calibration_error
from scripts.pipeline import load_pipeline

BOUNDS = (0.25, 8.0)


def find_temperature(nlp: Language, examples: Sequence[Example]) -> tuple[float, float, float]:
    """(temperature, calibration error without it, with it): the temperature gives the entities that the pipeline finds
    in the gold tokens the least log loss (Guo et al. 2017). The pipe `ner` is left with it.

    Raises UserError where the pipeline finds no entity.
    """
    ner = nlp.get_pipe("ner")
    batches = []
    gold, docs = [example.reference for example in examples], [example.predicted for example in examples]
    for start in range(0, len(docs), nlp.batch_size):
        batch = docs[start : start + nlp.batch_size]
        for name, pipe in nlp.pipeline:
            if name == "ner":
                break
            batch = list(pipe.pipe(batch))
        batches.append((batch, ner.predict(batch)))
        for doc in batch:
            if doc.has_extension("trf_data"):
                doc._.trf_data = None
    expected = [{(ent.start, ent.end, ent.label_) for ent in doc.ents} for doc in gold]

    def annotate(temperature: float) -> None:
        ner.cfg["temperature"] = temperature
        for batch, scores in batches:
            for doc in batch:
                doc.set_ents([], default="missing")
            ner.set_annotations(batch, scores)

    def log_loss(temperature: float) -> float:
        annotate(temperature)
        found = [(ent, known) for doc, known in zip(docs, expected, strict=True) for ent in doc.ents]
        scores = numpy.clip([ent._.score for ent, _ in found], 1e-6, 1 - 1e-6)
        right = numpy.array([(ent.start, ent.end, ent.label_) in known for ent, known in found])
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
    return temperature, before, error()


def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for the calibrated one", show_default=False)],
    corpus: Annotated[Path, typer.Option(help="Validation sentences (.spacy)")],
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = -1,
) -> None:
    """Calibrate the probabilities of entities on the validation sentences."""
    with one_sentence():
        nlp = load_pipeline(model, gpu_id)
        temperature, before, after = find_temperature(nlp, list(Corpus(corpus, gold_preproc=True)(nlp)))
        with replacing(output) as folder:
            shutil.copytree(model, folder, copy_function=link_or_copy)
            # a link must not be written through: it is the other pipeline's own file
            (folder / "ner" / "cfg").unlink()
            srsly.write_json(folder / "ner" / "cfg", nlp.get_pipe("ner").cfg)
        msg.good(
            f"{output}: temperature {temperature}; calibration error on the validation sentences {after * 100:.1f} "
            f"points instead of {before * 100:.1f}"
        )


if __name__ == "__main__":
    typer.run(main)
