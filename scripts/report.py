"""Write an HTML report of a pipeline's errors on the test sentences, in one file."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import matplotlib
import srsly
import typer
from markupsafe import Markup
from matplotlib.figure import Figure
from spacy import displacy
from spacy.scorer import PRFScore
from spacy.tokens import Doc, Span
from spacy.training import Corpus
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.evaluate import calibration_bins, entities_of, expected_calibration_error, score_labels
from scripts.pipeline import load_pipeline
from scripts.train import plot_training

TEMPLATE = Path(__file__).with_name("report.html")
LENGTHS = ((1, 3), (4, 6), (7, 12), (13, 25), (26, None))  # tokens
COLORS = {"PER": "#aec7e8", "ORG": "#ffbb78", "LOC": "#98df8a"}
BOUNDARIES = ("exact", "too short", "too long", "shifted")
MOST = 20  # errors in a list


@dataclass
class Pair:
    """A gold entity and the predicted one that overlaps it; None where one of the two is missing."""

    gold_doc: Doc
    predicted_doc: Doc
    gold: Span | None
    predicted: Span | None

    @property
    def is_error(self) -> bool:
        """Whether the two differ in boundaries or label."""
        one, other = (ent and (ent.start, ent.end, ent.label) for ent in (self.gold, self.predicted))
        return one != other

    @property
    def title(self) -> str:
        """The gold and the predicted entity, as text: errors with the same title are counted together."""
        return " → ".join(f"{ent.label_} “{ent.text}”" if ent else "nothing" for ent in (self.gold, self.predicted))


def best_overlap(ent: Span, others: Sequence[Span]) -> Span | None:
    """Return the entity that shares most tokens with `ent`, preferably of its label; None if none shares any."""
    shared = {other: min(ent.end, other.end) - max(ent.start, other.start) for other in others}
    overlapping = [other for other in others if shared[other] > 0]
    return max(overlapping, key=lambda other: (shared[other], other.label == ent.label), default=None)


def pair_entities(gold: Sequence[Doc], predicted: Sequence[Doc]) -> Iterator[Pair]:
    """Yield every entity in one or more pairs, sentence by sentence."""
    for gold_doc, doc in zip(gold, predicted, strict=True):
        others = [best_overlap(ent, doc.ents) for ent in gold_doc.ents]
        yield from (Pair(gold_doc, doc, *pair) for pair in zip(gold_doc.ents, others, strict=True))
        yield from (Pair(gold_doc, doc, None, ent) for ent in doc.ents if ent not in others)


def scores(pairs: Sequence[tuple[Doc, Doc]]) -> dict[str | None, PRFScore]:
    """Return the strict score of each label, and under None that of all entities."""
    return score_labels([entities_of(gold) for gold, _ in pairs], [entities_of(doc) for _, doc in pairs])


def length_scores(pairs: Sequence[tuple[Doc, Doc]]) -> list[tuple[str, int, float]]:
    """Return (tokens, gold entities, F1 as a fraction) for each range of sentence lengths that has an entity."""
    rows = []
    for low, high in LENGTHS:
        of_length = [pair for pair in pairs if low <= len(pair[0]) and (high is None or len(pair[0]) <= high)]
        s = scores(of_length)[None]
        if s.tp + s.fn:
            rows.append((f"{low}–{high}" if high else f"{low}+", s.tp + s.fn, s.fscore))
    return rows


def confusion(pairs: Sequence[Pair], labels: Sequence[str]) -> dict[str, Any]:
    """Count how often an entity of one label was predicted as another label or as none."""
    names = [*labels, "nothing"]
    counts = Counter(tuple(ent.label_ if ent else "nothing" for ent in (pair.gold, pair.predicted)) for pair in pairs)
    return {"columns": names, "rows": [(name, [counts[name, other] for other in names]) for name in names]}


def boundaries(pairs: Sequence[Pair], labels: Sequence[str]) -> dict[str, Any]:
    """Count the kinds of boundaries where both entities of a pair have the same label."""
    both = [(pair.gold, pair.predicted) for pair in pairs if pair.gold and pair.predicted]
    counts = Counter((gold.label_, _boundary(gold, ent)) for gold, ent in both if gold.label == ent.label)
    return {"columns": BOUNDARIES, "rows": [(label, [counts[label, kind] for kind in BOUNDARIES]) for label in labels]}


def _boundary(gold: Span, predicted: Span) -> str:
    if (gold.start, gold.end) == (predicted.start, predicted.end):
        return "exact"
    if gold.start <= predicted.start and predicted.end <= gold.end:
        return "too short"
    if predicted.start <= gold.start and gold.end <= predicted.end:
        return "too long"
    return "shifted"


def svg(figure: Figure) -> Markup:
    """Return the figure as an SVG element whose text has the page's font."""
    with io.StringIO() as stream, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
        text = stream.getvalue()
    return Markup(text[text.index("<svg") :])


def plot_lengths(rows: Sequence[tuple[str, int, float]]) -> Figure:
    """Plot F1 by sentence length."""
    figure = Figure(figsize=(4.2, 3.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar([row[0] for row in rows], [row[2] for row in rows], color="tab:green")
    axes.bar_label(bars, [f"{f1 * 100:.1f}\n({count})" for _, count, f1 in rows])
    axes.set(
        xlabel="tokens in the sentence", ylabel="F1 (gold entities)", ylim=(0, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1]
    )
    return figure


def plot_calibration(bins: Sequence[tuple[int, float, float]]) -> Figure:
    """Plot the share of right entities against their probability; the area of a dot is their number."""
    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    total = sum(count for count, _, _ in bins)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    sizes = [20 + 600 * count / total for count, _, _ in bins]
    axes.scatter([mean for _, mean, _ in bins], [right for _, _, right in bins], s=sizes, alpha=0.6)
    axes.set(xlabel="probability", ylabel="share right", xlim=(0, 1.05), ylim=(0, 1.05))
    return figure


def render(doc: Doc) -> Markup:
    """Render the entities of a Doc with displaCy, which would warn of a Doc without any."""
    ents = [{"start": ent.start_char, "end": ent.end_char, "label": ent.label_} for ent in doc.ents]
    parsed = {"text": doc.text, "ents": ents, "settings": displacy.get_doc_settings(doc)}
    return Markup(displacy.render(parsed, style="ent", manual=True, options={"colors": COLORS}, jupyter=False))


def make_report(gold: Sequence[Doc], predicted: Sequence[Doc], training: list[dict[str, Any]], name: str) -> str:
    """Return the report as HTML. predicted: Docs with `panx_score`. training: the rows of metrics/training.jsonl."""
    docs = list(zip(gold, predicted, strict=True))
    labels = sorted({ent.label_ for pair in docs for doc in pair for ent in doc.ents})
    pairs = list(pair_entities(gold, predicted))
    errors = [pair for pair in pairs if pair.is_error]
    counts = Counter(error.title for error in errors)
    first = {error.title: error for error in reversed(errors)}
    frequent = [(f"{count} ×: {title}", first[title]) for title, count in counts.most_common(MOST)]
    wrong = sorted((e for e in errors if e.predicted), key=lambda error: -error.predicted._.panx_score)[:MOST]
    confident = [(f"{e.predicted._.panx_score * 100:.1f} %: {e.title}", e) for e in wrong]
    bins = calibration_bins(gold, predicted)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf8")).render(
        name=name,
        sentences=len(docs),
        scores=scores(docs),
        errors=len(errors),
        training=svg(plot_training(training)),
        lengths=svg(plot_lengths(length_scores(docs))),
        calibration=svg(plot_calibration(bins)),
        calibration_error=expected_calibration_error(bins),
        confusion=confusion(pairs, labels),
        boundaries=boundaries(pairs, labels),
        frequent=frequent,
        confident=confident,
        render=render,
    )


@one_sentence()
def main(
    model: Annotated[str, typer.Argument(help="Trained pipeline", show_default=False)],
    corpus: Annotated[Path, typer.Argument(help="Gold sentences (.spacy)", show_default=False)],
    training: Annotated[Path, typer.Option(help="The training's table")] = Path("metrics/training.jsonl"),
    output: Annotated[Path, typer.Option(help="Where the report goes")] = Path("metrics/report.html"),
    name: Annotated[str, typer.Option(help="What the report calls the pipeline")] = "it_panx_xlmr",
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = -1,
) -> None:
    """Write an HTML report of a pipeline's errors on the test sentences."""
    for path in (training, corpus):
        if not path.is_file():
            raise UserError(f"{path}: missing; run `spacy project run all`, which makes it.")
    rows = list(srsly.read_jsonl(training))
    nlp = load_pipeline(model, gpu_id)
    examples = list(Corpus(corpus, gold_preproc=True)(nlp))
    gold = [example.reference for example in examples]
    predicted = list(nlp.pipe(example.predicted for example in examples))
    with replacing(output) as path:
        path.write_text(make_report(gold, predicted, rows, name), encoding="utf8")
    msg.good(f"{output}: {len(gold)} sentences; open it in a browser")


if __name__ == "__main__":
    typer.run(main)
