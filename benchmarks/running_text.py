"""Score a pipeline from raw text on token<TAB>tag files, as a reader of news or novels would meet it.

    python -m benchmarks.running_text training/model news.tsv fiction.tsv --first 2000

Tokens are joined by rule: none after an elided word, punctuation as `scripts.panx.guess_spaces` has it. Each file is
scored as it is, in capitals and in lower case, and with KIND's entities as docs/annotation.md has them: without common
nouns (`governo`), and with countries that act as places.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import spacy
import srsly
import typer
from spacy.language import Language
from spacy.tokens import Doc, Span

from scripts.common import one_sentence
from scripts.evaluate import Entity, entities_of, score_running_text
from scripts.panx import Sentence, guess_spaces, read_tsv
from scripts.running import load

ROOT = Path(__file__).resolve().parent.parent
OUR_GUIDELINES = "our guidelines"
CASES = {"as it is": str, "in capitals": str.upper, "in lower case": str.lower, OUR_GUIDELINES: str}


def make_gold(nlp: Language, sentences: Sequence[Sentence], case: str) -> list[Doc]:
    """Return the sentences as Docs with gold entities, their words in another letter case."""
    docs = []
    for sentence in sentences:
        # a word whose length changes in capitals (ß) is left alone
        words = [new if len(new := CASES[case](word)) == len(word) else word for word in sentence.words]
        # an elided word has lost a vowel; one that ends in a vowel is truncated (po') or accented (E')
        elided = [bool(re.search("[^\\W\\d_aeiou]['’]$", word, re.IGNORECASE)) for word in words]
        spaces = [space and not glued for space, glued in zip(guess_spaces(words), elided, strict=True)]
        docs.append(Doc(nlp.vocab, words=words, spaces=spaces, ents=sentence.tags))
    return docs


def by_our_guidelines(doc: Doc, places: set[str]) -> Doc:
    """Change the entities in place: drop those in lower case, and make ORG a LOC if its name is one of `places`."""
    kept = [ent for ent in doc.ents if not ent.text.islower()]
    doc.set_ents(
        [
            Span(doc, ent.start, ent.end, "LOC" if ent.label_ == "ORG" and ent.text in places else ent.label_)
            for ent in kept
        ]
    )
    return doc


def mostly_places() -> set[str]:
    """Return the names that the running corpus has as LOC nine times of ten or more."""
    lines = [line for documents in load(ROOT / "corpus" / "running").values() for some in documents for line in some]
    names = Counter((line.text[start:end], label) for line in lines for start, end, label in line.entities)
    every = Counter(name for name, label in names.elements())
    return {name for (name, label), count in names.items() if label == "LOC" and count >= 0.9 * every[name]}


def rows(name: str, case: str, score: dict[str, Any]) -> str:
    """Return one line of the printed table."""
    overlap = score["overlap"]
    labels = " ".join(f"{label} {row['f'] * 100:5.2f}" for label, row in score["ents_per_type"].items())
    return (
        f"{name:12} {case:14} P {score['ents_p'] * 100:5.2f} R {score['ents_r'] * 100:5.2f} "
        f"F {score['ents_f'] * 100:5.2f} | {labels} | overlap F {overlap['ents_f'] * 100:5.2f} | recall after elision "
        f"{score['after_elision'] * 100:5.2f}, elsewhere {score['elsewhere'] * 100:5.2f} | "
        f"{score['false_per_1000']:.2f} false per 1,000 tokens"
        + (f" | calibration {score['calibration_error'] * 100:.1f}" if "calibration_error" in score else "")
    )


def find_errors(nlp: Language, gold: Sequence[Doc]) -> Iterator[tuple[str, str]]:
    """Yield (kind, gold and predicted entity) of every error: missed, spurious, label or boundary."""
    for expected, doc in zip(gold, nlp.pipe(doc.text for doc in gold), strict=True):
        right, found = entities_of(expected), entities_of(doc)

        def name(entity: Entity | None, text: str = doc.text) -> str:
            return f"{entity[2]} “{text[entity[0] : entity[1]]}”" if entity else "nothing"

        missed, spurious = right - found, found - right
        for entity in sorted(missed):
            start, end, label = entity
            other = next((e for e in sorted(spurious) if e[0] < end and start < e[1]), None)
            kind = "missed" if other is None else "label" if other[:2] == (start, end) else "boundary"
            spurious.discard(other)
            yield kind, f"{name(entity)} → {name(other)}"
        for entity in sorted(spurious):
            yield "spurious", f"nothing → {name(entity)}"


def main(
    model: Annotated[str, typer.Argument(help="Pipeline: a folder or an installed package", show_default=False)],
    files: Annotated[list[Path], typer.Argument(help="token<TAB>tag files, IOB2", show_default=False)],
    first: Annotated[int, typer.Option(help="Score the first N sentences of each file; 0 for all", min=0)] = 0,
    last: Annotated[int, typer.Option(help="Score the last N sentences of each file; 0 for all", min=0)] = 0,
    errors: Annotated[int, typer.Option(help="Print the N most frequent errors of each file", min=0)] = 0,
    threshold: Annotated[float | None, typer.Option(help="Leave out less probable entities; else as packaged")] = None,
    precision: Annotated[Literal["float32", "bfloat16", "int8"] | None, typer.Option(help="Else as packaged")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for all scores")] = None,
) -> None:
    """Score a pipeline on running text with gold entities."""
    with one_sentence():
        given = {"ner.threshold": threshold, "transformer.model.precision": precision}
        config = {f"components.{key}": value for key, value in given.items() if value is not None}
        nlp, places = spacy.load(model, config=config), mostly_places()
        scores: dict[str, dict[str, Any]] = {}
        for path in files:
            sentences = read_tsv(path)
            part = sentences[-last:] if last else sentences[: first or None]
            gold = {case: make_gold(nlp, part, case) for case in CASES}
            gold[OUR_GUIDELINES] = [by_our_guidelines(doc, places) for doc in gold[OUR_GUIDELINES]]
            scores[path.stem] = {case: score_running_text(nlp, docs) for case, docs in gold.items()}
            for case, score in scores[path.stem].items():
                print(rows(path.stem, case, score))
            curve = scores[path.stem]["as it is"].get("coverage", [])  # none for another project's pipeline
            points = (f"{t:.2f} {p * 100:.1f} {r * 100:.1f}" for t, p, r in curve)
            print("threshold, precision, recall:", "; ".join(points))
            if errors:
                found = list(find_errors(nlp, gold["as it is"]))
                print("errors:", ", ".join(f"{n} {kind}" for kind, n in Counter(k for k, _ in found).most_common()))
                for (kind, names), n in Counter(found).most_common(errors):
                    print(f"{n:4} {kind:9} {names}")
        if output:
            srsly.write_json(output, scores)


if __name__ == "__main__":
    typer.run(main)
