"""Calibrate `span._.panx_score` by temperature scaling: it then says how often such an entity is right."""

from collections.abc import Sequence

import numpy
from scipy.optimize import minimize_scalar
from spacy.language import Language
from spacy.training import Example
from spacy.util import minibatch

from scripts.common import UserError
from scripts.evaluate import calibration_bins, expected_calibration_error, scored_entities


def find_temperature(nlp: Language, parts: Sequence[Sequence[Example]]) -> tuple[float, float, float]:
    """Return (temperature, calibration error before, after) and leave the pipe `ner` with that temperature.

    The temperature minimizes the log loss of all entities found in the gold tokens (Guo et al. 2017), whatever the
    pipe's threshold. Each part with an entity counts the same. Raises UserError if the pipeline finds no entity.
    """
    ner = nlp.get_pipe("ner")
    threshold, ner.threshold = ner.threshold, 0.0
    batches = []
    for batch in minibatch([example.predicted for examples in parts for example in examples], 64):
        batch = list(nlp.pipe(batch, disable=["ner", "doc_cleaner"]))
        batches.append((batch, ner.predict(batch)))
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
        losses = []
        for scores, right in (scored_entities(*part) for part in found):
            scores = scores.clip(1e-6, 1 - 1e-6)
            losses.append(-numpy.where(right, numpy.log(scores), numpy.log(1 - scores)).mean())
        return float(numpy.mean(losses))

    def error() -> float:
        return float(numpy.mean([expected_calibration_error(calibration_bins(*part)) for part in found]))

    annotate(1.0)
    both = [([e.reference for e in examples], [e.predicted for e in examples]) for examples in parts]
    found = [(gold, docs) for gold, docs in both if any(doc.ents for doc in docs)]  # at any temperature
    if not found:
        raise UserError(
            "The pipeline finds no entity in the validation sentences; train on more sentences or for longer "
            "(--vars.train_size, --vars.epochs)."
        )
    before = error()
    temperature = round(float(minimize_scalar(log_loss, bounds=(0.25, 8.0), method="bounded").x), 3)
    annotate(temperature)
    after, ner.threshold = error(), threshold
    return temperature, before, after
