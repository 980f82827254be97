"""What `spacy evaluate` does not measure: F1 from raw text, and seqeval's score of the same predictions."""

import hashlib
from collections.abc import Sequence
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


def score_raw_text(nlp: Language, gold: Sequence[Doc]) -> dict[str, Any]:
    """Precision, recall and F1 of entities found in each gold Doc's text by the whole pipeline, tokenizer included.

    Strict: an entity counts only with the gold entity's label and exactly its first and last character. The keys are
    those of `spacy evaluate`; all values are fractions.
    """
    total, per_type = PRFScore(), {}
    for reference, doc in zip(gold, nlp.pipe(doc.text for doc in gold), strict=True):
        expected, found = ({(ent.label_, ent.start_char, ent.end_char) for ent in d.ents} for d in (reference, doc))
        total.score_set(found, expected)
        for label in {label for label, _, _ in expected | found}:
            score = per_type.setdefault(label, PRFScore())
            score.score_set({x for x in found if x[0] == label}, {x for x in expected if x[0] == label})
    return {
        "ents_p": total.precision,
        "ents_r": total.recall,
        "ents_f": total.fscore,
        "ents_per_type": {label: score.to_dict() for label, score in sorted(per_type.items())},
    }


def score_seqeval(gold: Sequence[Doc], predicted: Sequence[Doc]) -> dict[str, Any]:
    """seqeval's micro-averaged score of IOB2 tags in strict mode (Nakayama 2018), keys as `spacy evaluate` has them.

    Both sequences hold the same tokens. It is the reference that `ents_f` is checked against.
    """
    tags = [[_iob2(doc) for doc in docs] for docs in (gold, predicted)]
    precision, recall, f1, _ = precision_recall_fscore_support(*tags, average="micro", scheme=IOB2, zero_division=0)
    return {"ents_p": float(precision), "ents_r": float(recall), "ents_f": float(f1)}


def calibration_bins(gold: Sequence[Doc], predicted: Sequence[Doc], bins: int = 10) -> list[tuple[int, float, float]]:
    """(how many, mean probability, share that is right) of the predicted entities in each bin of equal width of
    `span._.score` that has any. Right are those with a gold entity's label and exactly its first and last character.
    """
    scores, right = [], []
    for reference, doc in zip(gold, predicted, strict=True):
        expected = {(ent.label_, ent.start_char, ent.end_char) for ent in reference.ents}
        scores += [ent._.score for ent in doc.ents]
        right += [(ent.label_, ent.start_char, ent.end_char) in expected for ent in doc.ents]
    number = numpy.minimum((numpy.array(scores) * bins).astype("int64"), bins - 1)
    rows = []
    for i in range(bins):
        inside = number == i
        if inside.any():
            mean, share = numpy.array(scores)[inside].mean(), numpy.array(right)[inside].mean()
            rows.append((int(inside.sum()), float(mean), float(share)))
    return rows


def expected_calibration_error(bins: Sequence[tuple[int, float, float]]) -> float:
    """The mean over all entities of how far their bin's share of right ones is from its mean probability (Guo et al.
    2017), as a fraction; 0 where there is no entity.
    """
    total = sum(count for count, _, _ in bins)
    return sum(count * abs(mean - share) for count, mean, share in bins) / total if total else 0.0


def weights_digest(model: Path) -> str:
    """SHA-256 of a pipeline's weights, by which its figures are known to be its own."""
    sha256 = hashlib.sha256()
    for path in sorted(model.glob("*/model")):
        with path.open("rb") as file:
            sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()


def _iob2(doc: Doc) -> list[str]:
    return [f"{token.ent_iob_}-{token.ent_type_}" if token.ent_type_ else "O" for token in doc]


def main(
    model: Annotated[
        str, typer.Argument(help="Trained pipeline: a folder or an installed package", show_default=False)
    ],
    corpus: Annotated[Path, typer.Argument(help="Gold sentences (.spacy)", show_default=False)],
    raw_text: Annotated[Path, typer.Option(help="Where the score from raw text goes")] = Path("metrics/raw_text.json"),
    seqeval: Annotated[Path, typer.Option(help="Where seqeval's score goes")] = Path("metrics/seqeval.json"),
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = -1,
) -> None:
    """Score a pipeline from raw text, by characters, and by seqeval on the gold tokens."""
    with one_sentence():
        nlp = load_pipeline(model, gpu_id)
        examples = list(Corpus(corpus, gold_preproc=True)(nlp))
        gold = [example.reference for example in examples]
        predicted = list(nlp.pipe(example.predicted for example in examples))
        scores = {raw_text: score_raw_text(nlp, gold), seqeval: score_seqeval(gold, predicted)}
        scores[raw_text]["ents_calibration_error"] = expected_calibration_error(calibration_bins(gold, predicted))
        if Path(model).exists():
            scores[raw_text]["weights"] = weights_digest(Path(model))
        for path, score in scores.items():
            with replacing(path) as temporary:
                srsly.write_json(temporary, score)
        for name, path in (("raw text, by characters", raw_text), ("gold tokens, seqeval", seqeval)):
            row = scores[path]
            figures = " ".join(f"{key[-1].upper()} {row[key] * 100:.2f}" for key in ("ents_p", "ents_r", "ents_f"))
            msg.good(f"{name}: {figures} → {path}")


if __name__ == "__main__":
    typer.run(main)
