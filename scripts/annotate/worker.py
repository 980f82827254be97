"""Annotate a unit of rows and write its files: the annotated rows as Parquet, the bad rows with the reason as JSONL."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import spacy
import srsly
import torch
from spacy.language import Language
from spacy.tokens import Span
from spacy.util import get_package_path, is_package

from scripts.annotate.units import Unit
from scripts.common import UserError, replacing

ENTITY = {"start": pyarrow.int32(), "end": pyarrow.int32(), "label": pyarrow.string(), "score": pyarrow.float32()}
COLUMNS = {"file": pyarrow.string(), "row": pyarrow.int64(), "text": pyarrow.string()}
SCHEMA = pyarrow.schema(COLUMNS | {"entities": pyarrow.list_(pyarrow.struct(ENTITY))})


def identify(model: str, precision: str | None = None) -> str:
    """Return a pipeline's name, version and the SHA-256 of its files. Raises UserError if it cannot be loaded."""
    try:
        folder = get_package_path(model) if is_package(model) else Path(model)
    except ImportError:  # spaCy takes the name of any installed project, such as it-panx-xlmr, for a package
        folder = Path(model)
    # an installed package has its config in a subfolder
    path = min(folder.rglob("config.cfg"), key=lambda path: len(path.parts), default=None)
    if not path or not (folder / "meta.json").is_file():
        raise UserError(f"{model}: neither an installed pipeline nor a pipeline's folder; install its wheel first.")
    config = path.read_text(encoding="utf8")
    if not is_package(model) and "panx_xlmr." in config:
        raise UserError(f"{model}: a pipeline without its code; install the wheel that `package` builds and name that.")
    if precision and "\nprecision = " not in config:
        raise UserError(f"{model}: the pipeline has no setting `precision`; leave out --precision.")
    meta, digest = srsly.read_json(folder / "meta.json"), hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(f"{path.relative_to(folder).as_posix()} ".encode() + path.read_bytes())
    return f"{meta['lang']}_{meta['name']} {meta['version']} {digest.hexdigest()}"


def annotate_texts(nlp: Language, texts: list[str]) -> list[list[dict[str, Any]] | str]:
    """Return each text's entities, or the reason why the pipeline fails on it. Raises what it raises on any text."""

    def entity(e: Span) -> dict[str, Any]:
        score = getattr(e._, "panx_score", None)  # other pipelines have none
        return {"start": e.start_char, "end": e.end_char, "label": e.label_, "score": score}

    try:
        with nlp.memory_zone():  # or the vocabulary would grow with every new word
            return [[entity(e) for e in doc.ents] for doc in nlp.pipe(texts)]
    except Exception as error:
        if len(texts) > 1:
            return [annotate_texts(nlp, [text])[0] for text in texts]
        nlp("Una prova.")  # raises if it is not the text: no memory, a broken GPU
        return [f"the pipeline fails: {type(error).__name__}: {error}"]


class Annotator:
    """The Ray actor: holds the pipeline and annotates one unit per call."""

    def __init__(self, model: str, output: Path, settings: dict[str, Any], cpus: int, gpu: bool) -> None:
        self.model, self.output, self.settings, self.cpus, self.gpu = model, output, settings, cpus, gpu
        self.nlp: Language | None = None  # the first unit loads it: Ray gives up units, but never an actor's start

    def load(self) -> Language:
        """Load the pipeline. Raises UserError if it is another one than the driver's."""
        torch.set_num_threads(self.cpus)
        if self.gpu:
            spacy.require_gpu()
        if identify(self.model) != self.settings["model"]:
            raise UserError(f"{self.model} is another pipeline on this machine; install the same wheel.")
        precision = self.settings["precision"]
        config = {"components.transformer.model.precision": precision} if precision else {}
        nlp = spacy.load(self.model, config=config)
        nlp.max_length = max(nlp.max_length, self.settings["max_chars"])
        return nlp

    def annotate(self, unit: Unit) -> int:
        """Write a unit's files, the annotated rows last, and return the number of bad rows."""
        part = self.output / unit.part
        if not part.exists():  # it exists if a worker was killed after it had written the unit
            self.nlp = self.nlp or self.load()
            found = iter(annotate_texts(self.nlp, [text for text, _ in unit.rows if text is not None]))
            good, bad = [], []
            for row, (text, reason) in enumerate(unit.rows, unit.first):
                result = reason or next(found)
                if isinstance(result, str):
                    bad.append({"file": unit.name, "row": row, "reason": result})
                else:
                    good.append({"file": unit.name, "row": row, "text": text, "entities": result})
            bad_path = self.output / "_bad" / f"{part.stem}.jsonl"  # readers of Parquet folders ignore names with `_`
            bad_path.unlink(missing_ok=True)  # of a worker that was killed
            if bad:
                with replacing(bad_path) as file:
                    srsly.write_jsonl(file, bad)
            with replacing(part) as file:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good, schema=SCHEMA), file, compression="zstd")
                with file.open("rb") as written:
                    os.fsync(written.fileno())  # after a power cut, no name without its content
        return len(unit.rows) - pyarrow.parquet.read_metadata(part).num_rows
