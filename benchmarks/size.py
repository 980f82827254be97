"""What slimming costs and gains: size, time to load, peak memory and F1 of the trained pipeline, as it is and slimmed.

    python benchmarks/size.py training/model-last --data assets/data

Four variants are made of the trained pipeline: as it is, with fewer wordpieces, and that with weights in 16 and in 8
bits. Each is loaded and run in processes of its own. Size is that of the folder as a wheel compresses it. It is counted
how many texts get other entities than from the whole pipeline, and how many of these have kept wordpieces only: of the
test sentences, and with --texts of any others, of which nobody needs to know the entities.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import spacy
import srsly
import typer
from spacy.tokens import DocBin
from wasabi import msg

from scripts import slim as slim_script

ROOT = Path(__file__).resolve().parent.parent

LOAD = """
import json, sys, time
sys.path.insert(0, sys.argv[2])
import spacy, scripts.pipeline
start = time.perf_counter()
nlp = spacy.load(sys.argv[1])
loaded = time.perf_counter() - start
nlp("Grazia Deledda nacque a Nuoro.")
# getrusage would count what the parent had before this program took its place
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([loaded, int(peak) / 1e6]))
"""


def make_variants(
    model: Path, folder: Path, sentences: list[str], lang: str, count: int
) -> tuple[dict[str, Path], set[str]]:
    """Saves the variants in `folder`; returns their folders by name, and the wordpieces that are kept."""
    variants = {"as trained": model}
    for name, bits in (("fewer wordpieces", None), ("and 16 bits", 16), ("and 8 bits", 8)):
        nlp = spacy.load(model)
        encoder = nlp.get_pipe("transformer").model
        kept = slim_script.needed_ids(encoder.tokenizer, sentences, slim_script.frequent_words(lang), count)
        pieces = set(encoder.tokenizer.convert_ids_to_tokens(kept))
        slim_script.trim(encoder, kept)
        if bits:
            slim_script.round_weights(encoder, bits)
        variants[name] = folder / name
        nlp.to_disk(variants[name])
    return variants, pieces


def zipped_size(folder: Path) -> float:
    """MB of the folder's files, deflated one by one as in a wheel."""
    with tempfile.TemporaryFile() as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
        return sum(entry.compress_size for entry in archive.infolist()) / 1e6


def count_changes(before: list[list[tuple]], after: list[list[tuple]], whole: list[bool]) -> list[str]:
    """How many texts have other entities, how many of them have kept wordpieces only, and the F1 of the entities after
    against those before, in percent.
    """
    changed = [kept for one, other, kept in zip(before, after, whole, strict=True) if one != other]
    same = sum(len(set(one) & set(other)) for one, other in zip(before, after, strict=True))
    agreement = 200 * same / max(sum(map(len, before)) + sum(map(len, after)), 1)
    return [str(len(changed)), str(sum(changed)), f"{agreement:.2f}"]


def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline, not slimmed", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder with the training sentences as TSV")] = ROOT / "assets" / "data",
    train: Annotated[Path, typer.Option(help="What was trained on (.spacy)")] = ROOT / "corpus" / "train.spacy",
    test: Annotated[Path, typer.Option(help="Test sentences (.spacy)")] = ROOT / "corpus" / "test.spacy",
    texts: Annotated[Path | None, typer.Option(help="Other texts: JSONL with text")] = None,
    runs: Annotated[int, typer.Option(help="Times that each variant is loaded")] = 5,
) -> None:
    """Measure the trained pipeline as it is, and made small step by step."""
    variables = srsly.read_yaml(ROOT / "project.yml")["vars"]
    lang = variables["lang"]
    collections = {"test sentences": [doc.text for doc in DocBin().from_disk(test).get_docs(spacy.blank(lang).vocab)]}
    if texts:
        collections["other texts"] = [row["text"] for row in srsly.read_jsonl(texts)]
    sentences = slim_script.training_texts(data, train, lang)
    rows, changes = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants, pieces = make_variants(model, folder, sentences, lang, variables["slim_pieces"])
        entities: dict[str, list[list[tuple]]] = {}
        whole: dict[str, list[bool]] = {}
        for variant, path in variants.items():
            loads = []
            for _ in range(runs):
                command = [sys.executable, "-c", LOAD, path, ROOT]
                loads.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
            seconds, memory = (statistics.median(load[i] for load in loads) for i in (0, 1))
            spacy_evaluate = [sys.executable, "-m", "spacy", "evaluate", path, test, "--gold-preproc"]
            code, output = ROOT / "scripts" / "train.py", folder / "gold.json"
            subprocess.run([*spacy_evaluate, "--code", code, "--output", output], capture_output=True, check=True)
            gold = srsly.read_json(output)["ents_f"]
            nlp = spacy.load(path)
            rows.append(
                (variant, f"{zipped_size(path):.1f} MB", f"{seconds:.2f} s", f"{memory:.2f} GB", f"{gold * 100:.2f}")
            )
            for kind, some in collections.items():
                found = [[(e.start_char, e.end_char, e.label_) for e in doc.ents] for doc in nlp.pipe(some)]
                if kind not in entities:  # of the pipeline as it was trained, which is the first
                    tokenizer = nlp.get_pipe("transformer").model.tokenizer.backend_tokenizer
                    cut = tokenizer.encode_batch(some, add_special_tokens=False)
                    entities[kind], whole[kind] = found, [set(encoding.tokens) <= pieces for encoding in cut]
                else:
                    changes.append((kind, variant, *count_changes(entities[kind], found, whole[kind])))
    msg.table(rows, header=("pipeline", "zipped", "load", "peak memory", "F1, gold tokens"), divider=True)
    header = ("texts", "pipeline", "changed", "of those all kept", "F1 against as trained")
    msg.table(sorted(changes, reverse=True), header=header, divider=True)
    for kind, kept in whole.items():
        count = sum(map(len, entities[kind]))
        print(f"{sum(kept):,} of {len(kept):,} {kind} have kept wordpieces only; {count:,} entities as trained")


if __name__ == "__main__":
    typer.run(main)
