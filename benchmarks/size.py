"""Measure what slimming costs and gains: size, load time, peak memory and F1 of the trained pipeline.

    python -m benchmarks.size training/model-last --data assets/data

Compare four variants: the pipeline as trained, with fewer wordpieces, and the latter with 16-bit and 8-bit weights.
Each is loaded several times, every time in a new process with one thread; times are CPU seconds. Size is that of the
folder's files as a wheel compresses them. Also count the texts whose entities differ from those of the pipeline as
trained, and how many of these texts have kept wordpieces only: for the test sentences, and with --texts for any other
texts, which need no annotation.
"""

import json
import os
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

from scripts.pipeline import load_pipeline
from scripts.pipeline.tokenizer import encoder_text
from scripts.slim import frequent_words, needed_ids, prune, round_weights, training_texts

ROOT = Path(__file__).resolve().parent.parent

# CPU seconds of spacy.load, and the peak memory in GB
LOAD = """
import json, sys, time
import spacy, scripts.pipeline
imported = time.process_time()
nlp = spacy.load(sys.argv[1])
loaded = time.process_time() - imported
nlp("Grazia Deledda nacque a Nuoro.")
# not getrusage, which includes the parent's memory at the time of the fork
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([loaded, int(peak) / 1e6]))
"""


def make_variants(
    model: Path, folder: Path, sentences: list[str], lang: str, count: int
) -> tuple[dict[str, Path], set[str]]:
    """Save the variants in `folder`; return their folders by name, and the kept wordpieces."""
    variants = {"as trained": model}
    for name, bits in (("fewer wordpieces", None), ("and 16 bits", 16), ("and 8 bits", 8)):
        nlp = load_pipeline(model)
        encoder = nlp.get_pipe("transformer").model
        prune(encoder, needed_ids(encoder.tokenizer, sentences, frequent_words(lang), count))
        pieces = set(encoder.tokenizer.get_vocab())
        if bits:
            round_weights(encoder, bits)
        variants[name] = folder / name
        nlp.to_disk(variants[name])
    return variants, pieces


def zipped_size(folder: Path) -> float:
    """Return the size in MB of the folder's files, deflated one by one as in a wheel."""
    with tempfile.TemporaryFile() as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
        return sum(entry.compress_size for entry in archive.infolist()) / 1e6


def count_changes(before: list[list[tuple]], after: list[list[tuple]], whole: list[bool]) -> list[str]:
    """Return three figures: texts with other entities, those of them with kept wordpieces only, and F1 in percent.

    F1 is that of the entities after against those before.
    """
    changed = [kept for one, other, kept in zip(before, after, whole, strict=True) if one != other]
    same = sum(len(set(one) & set(other)) for one, other in zip(before, after, strict=True))
    agreement = 200 * same / max(sum(map(len, before)) + sum(map(len, after)), 1)
    return [str(len(changed)), str(sum(changed)), f"{agreement:.2f}"]


def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline, as `train` writes it", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder with the training sentences as TSV")] = ROOT / "assets" / "data",
    train: Annotated[Path, typer.Option(help="The training corpus (.spacy)")] = ROOT / "corpus" / "train.spacy",
    test: Annotated[Path, typer.Option(help="Test sentences (.spacy)")] = ROOT / "corpus" / "test.spacy",
    texts: Annotated[Path | None, typer.Option(help="Other texts: JSONL with a field text")] = None,
    runs: Annotated[int, typer.Option(help="Number of loads per variant")] = 5,
) -> None:
    """Measure the trained pipeline and its slim variants."""
    variables = srsly.read_yaml(ROOT / "project.yml")["vars"]
    lang = variables["lang"]
    collections = {"test sentences": [doc.text for doc in DocBin().from_disk(test).get_docs(spacy.blank(lang).vocab)]}
    if texts:
        collections["other texts"] = [row["text"] for row in srsly.read_jsonl(texts)]
    sentences = training_texts(data, train, lang)
    rows, changes = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants, pieces = make_variants(model, folder, sentences, lang, variables["slim_pieces"])
        entities: dict[str, list[list[tuple]]] = {}
        whole: dict[str, list[bool]] = {}
        for variant, path in variants.items():
            loads = []
            for _ in range(runs):
                command = [sys.executable, "-c", LOAD, path]
                one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, capture_output=True, check=True, env=one_thread)
                loads.append(json.loads(done.stdout))
            seconds, memory = (statistics.median(load[i] for load in loads) for i in range(2))
            spacy_evaluate = [sys.executable, "-m", "spacy", "evaluate", path, test, "--gold-preproc"]
            code, output = ROOT / "scripts" / "train.py", folder / "gold.json"
            subprocess.run([*spacy_evaluate, "--code", code, "--output", output], capture_output=True, check=True)
            gold = srsly.read_json(output)["ents_f"]
            nlp = load_pipeline(path)
            costs = f"{seconds:.2f} s", f"{memory:.2f} GB"
            rows.append((variant, f"{zipped_size(path):.1f} MB", *costs, f"{gold * 100:.2f}"))
            for kind, some in collections.items():
                found = [[(e.start_char, e.end_char, e.label_) for e in doc.ents] for doc in nlp.pipe(some)]
                if kind not in entities:  # the first variant is the pipeline as trained
                    tokenizer = nlp.get_pipe("transformer").model.tokenizer.backend_tokenizer
                    read = [encoder_text(nlp.make_doc(text))[0] for text in some]
                    encodings = tokenizer.encode_batch(read, add_special_tokens=False)
                    entities[kind], whole[kind] = found, [set(encoding.tokens) <= pieces for encoding in encodings]
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
