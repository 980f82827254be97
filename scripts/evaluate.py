"""Measure what `spacy evaluate` does not: entities found in raw text, seqeval's score, and calibration."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy
import srsly
import typer
from seqeval.metrics.v1 import precision_recall_fscore_support
from seqeval.scheme import IOB2
from spacy.language import Language
from spacy.scorer import PRFScore
from spacy.tokens import Doc
from spacy.training import Corpus
from wasabi import msg

from scripts.common import one_sentence, replacing
from scripts.pipeline import load_pipeline

Entity = tuple[int, int, str]  # first character, character after the last, label
THRESHOLDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def entities_of(doc: Doc) -> set[Entity]:
    """Return the entities of a Doc by characters."""
    return {(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents}


def score_labels(gold: Sequence[set[Entity]], found: Sequence[set[Entity]]) -> dict[str | None, PRFScore]:
    """Return the strict score of each label that occurs, in alphabetical order, and under None that of all entities."""
    labels = sorted({label for entities in (*gold, *found) for _, _, label in entities})
    scores = {label: PRFScore() for label in (*labels, None)}
    for expected, predicted in zip(gold, found, strict=True):
        for label, score in scores.items():
            of_label = [{e for e in entities if label in (None, e[2])} for entities in (predicted, expected)]
            score.score_set(*of_label)
    return scores


def score_entities(gold: Sequence[set[Entity]], found: Sequence[set[Entity]]) -> dict[str, Any]:
    """Return strict precision, recall and F1 over all texts and per label, as fractions, with `spacy evaluate`'s keys.

    An entity is right if its label and its first and last character are.
    """
    scores = score_labels(gold, found)
    total = scores.pop(None)
    return {
        "ents_p": total.precision,
        "ents_r": total.recall,
        "ents_f": total.fscore,
        "ents_per_type": {label: score.to_dict() for label, score in scores.items()},
    }


def score_overlaps(gold: Sequence[set[Entity]], found: Sequence[set[Entity]]) -> dict[str, float]:
    """Return precision, recall and F1 where a shared character and the same label are enough."""
    pairs = list(zip(gold, found, strict=True))
    precision = _share(_touches(e, expected) for expected, predicted in pairs for e in predicted)
    recall = _share(_touches(e, predicted) for expected, predicted in pairs for e in expected)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"ents_p": precision, "ents_r": recall, "ents_f": f1}


def _touches(entity: Entity, others: Iterable[Entity]) -> bool:
    start, end, label = entity
    return any(start < b and a < end and label == other for a, b, other in others)


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values) if values else 0.0


def score_raw_text(nlp: Language, gold: Sequence[Doc]) -> dict[str, Any]:
    """Score the entities found in each gold Doc's text by the whole pipeline, tokenizer included.

    Returns what `score_entities` returns and, under `without_glued`, the same without entities found inside tokens like
    `dell'Italia` that PAN-X leaves out.
    """
    expected = [entities_of(doc) for doc in gold]
    found = [entities_of(doc) for doc in nlp.pipe(doc.text for doc in gold)]
    judged = []
    for doc, entities in zip(gold, found, strict=True):
        glued = [
            (token.idx, token.idx + len(token))
            for token in doc
            if not token.ent_type_ and any(a in "'’" and b.isupper() for a, b in itertools.pairwise(token.text))
        ]
        judged.append({e for e in entities if not any(a <= e[0] and e[1] <= b for a, b in glued)})
    return score_entities(expected, found) | {"without_glued": score_entities(expected, judged)}


def score_running_text(nlp: Language, gold: Sequence[Doc]) -> dict[str, Any]:
    """Score a pipeline on text that is not PAN-X's: what `score_entities` returns, and these keys.

    `overlap`: see score_overlaps. `after_elision`, `elsewhere`: exact recall of names after an elided word and of all
    others. `false_per_1000`: entities found per 1,000 tokens in texts without any. `calibration_error`: see
    expected_calibration_error. `coverage`: (threshold, precision, share of the gold entities found) by `panx_score`.
    The last two are left out if an entity has no `panx_score`.
    """
    expected = [entities_of(doc) for doc in gold]
    docs = list(nlp.pipe(doc.text for doc in gold))
    found = [entities_of(doc) for doc in docs]
    recalls: dict[bool, list[bool]] = {True: [], False: []}
    for doc, entities, predicted in zip(gold, expected, found, strict=True):
        for entity in entities:
            recalls[doc.text[: entity[0]].endswith(("'", "’"))].append(entity in predicted)
    empty = [(doc, predicted) for doc, predicted in zip(gold, found, strict=True) if not doc.ents]
    tokens = sum(len(doc) for doc, _ in empty)
    figures = score_entities(expected, found) | {
        "overlap": score_overlaps(expected, found),
        "after_elision": _share(recalls[True]),
        "elsewhere": _share(recalls[False]),
        "false_per_1000": 1000 * sum(len(predicted) for _, predicted in empty) / tokens if tokens else 0.0,
    }
    if all(ent._.panx_score is not None for doc in docs for ent in doc.ents):
        figures["calibration_error"] = expected_calibration_error(calibration_bins(gold, docs))
        figures["coverage"] = coverage(gold, docs)
    return figures


def scored_entities(gold: Sequence[Doc], predicted: Sequence[Doc]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return `panx_score` of each predicted entity, and whether it is right, by characters and label."""
    pairs = [
        (ent._.panx_score, (ent.start_char, ent.end_char, ent.label_) in expected)
        for expected, doc in zip(map(entities_of, gold), predicted, strict=True)
        for ent in doc.ents
    ]
    scores, right = zip(*pairs, strict=True) if pairs else ((), ())
    return numpy.array(scores, dtype="float64"), numpy.array(right, dtype=bool)


def coverage(gold: Sequence[Doc], predicted: Sequence[Doc]) -> list[tuple[float, float, float]]:
    """Return (threshold, precision, recall) of the entities whose `panx_score` is at least the threshold."""
    scores, right = scored_entities(gold, predicted)
    total = max(sum(len(doc.ents) for doc in gold), 1)
    kept = [(threshold, right[scores >= threshold]) for threshold in THRESHOLDS]
    return [(t, float(some.mean()) if len(some) else 1.0, float(some.sum() / total)) for t, some in kept]


def score_seqeval(gold: Sequence[Doc], predicted: Sequence[Doc]) -> dict[str, Any]:
    """Return seqeval's micro-averaged strict IOB2 score (Nakayama 2018), the reference for `spacy evaluate`.

    Both sequences have the same tokens.
    """
    tags = [[iob2(doc) for doc in docs] for docs in (gold, predicted)]
    precision, recall, f1, _ = precision_recall_fscore_support(*tags, average="micro", scheme=IOB2, zero_division=0)
    return {"ents_p": float(precision), "ents_r": float(recall), "ents_f": float(f1)}


def calibration_bins(gold: Sequence[Doc], predicted: Sequence[Doc], bins: int = 10) -> list[tuple[int, float, float]]:
    """Return (count, mean probability, share right) for each bin of `panx_score`, of equal width, that is not empty."""
    scores, right = scored_entities(gold, predicted)
    number = numpy.minimum((scores * bins).astype("int64"), bins - 1)
    inside = [number == i for i in range(bins)]
    return [(int(i.sum()), float(scores[i].mean()), float(right[i].mean())) for i in inside if i.any()]


def expected_calibration_error(bins: Sequence[tuple[int, float, float]]) -> float:
    """Return the mean gap between the bins' probability and precision, weighted by entities (Guo et al. 2017).

    It is a fraction, and 0 without entities.
    """
    total = sum(count for count, _, _ in bins)
    return sum(count * abs(mean - share) for count, mean, share in bins) / total if total else 0.0


def weights_digest(model: Path) -> str:
    """Return the SHA-256 of a pipeline's weights, which ties its figures to it."""
    sha256 = hashlib.sha256()
    for path in sorted(model.glob("*/model")):
        with path.open("rb") as file:
            sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()


def iob2(doc: Doc) -> list[str]:
    """Return the IOB2 tag of each token."""
    return [f"{token.ent_iob_}-{token.ent_type_}" if token.ent_type_ else "O" for token in doc]


@one_sentence()
def main(
    model: Annotated[str, typer.Argument(help="Folder or installed package of a pipeline", show_default=False)],
    corpus: Annotated[Path, typer.Argument(help="PAN-X's gold sentences (.spacy)", show_default=False)],
    running: Annotated[Path | None, typer.Option(help="Gold running text (.spacy); it may be empty")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the JSON files")] = Path("metrics"),
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = -1,
) -> None:
    """Score a pipeline from raw text, by seqeval on the gold tokens, and on running text."""
    nlp = load_pipeline(model, gpu_id)
    examples = list(Corpus(corpus, gold_preproc=True)(nlp))
    gold = [example.reference for example in examples]
    predicted = list(nlp.pipe(example.predicted for example in examples))
    scores = {"raw_text": score_raw_text(nlp, gold), "seqeval": score_seqeval(gold, predicted)}
    scores["raw_text"]["ents_calibration_error"] = expected_calibration_error(calibration_bins(gold, predicted))
    if Path(model).exists():
        scores["raw_text"]["weights"] = weights_digest(Path(model))
    texts = [example.reference for example in Corpus(running, gold_preproc=True)(nlp)] if running else []
    scores["running"] = score_running_text(nlp, texts) if texts else {}
    titles = {"raw_text": "raw text, by characters", "seqeval": "gold tokens, seqeval", "running": "running text"}
    for name, score in scores.items():
        with replacing(output / f"{name}.json") as path:
            srsly.write_json(path, score)
        if score:
            figures = " ".join(f"{k[-1].upper()} {score[k] * 100:.2f}" for k in ("ents_p", "ents_r", "ents_f"))
            msg.good(f"{titles[name]}: {figures} → {output / name}.json")


if __name__ == "__main__":
    typer.run(main)
