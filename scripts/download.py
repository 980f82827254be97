"""Copy the data and the encoder, from the Hugging Face Hub or from local folders, to the assets folder."""

import contextlib
import hashlib
import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from huggingface_hub import snapshot_download
from safetensors import safe_open
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.panx import SPLITS, Sentence, check_tags, digest, read_tsv, split_path, to_tsv

# `datasets` and `transformers` are imported where they are used because they load slowly

EXPECTED = {
    "dataset": "TSV files (train-LANG.tsv or train.tsv, and so on) or Parquet files in the Hub's layout",
    "encoder": "config.json, a tokenizer and model.safetensors (pickled weights are not read, since they can run code)",
}
HUB_ADVICE = "check the name, the revision and the connection, run `make demo`, which needs no Hub, or "
ENCODER_FILES = ("LICENSE*", "*.json", "*.model", "*.txt", "model*.safetensors")
Record = dict[str, Any]  # an entry of provenance.json
Sentences = dict[str, list[Sentence]]  # by split, or by the name of the further training data


def reason(error: BaseException) -> str:
    """Return the text of a library's error in one line."""
    # the Hub's errors are OSErrors and say enough; "An error occurred while generating the dataset" does not
    error = error if isinstance(error, OSError) else error.__cause__ or error
    return " ".join(str(error).split())[:400] or type(error).__name__


@contextlib.contextmanager
def explained(kind: str, name: str, folder: Path | None = None) -> Iterator[None]:
    """Turn any error of a library into a UserError about a dataset or encoder (`kind`), in a folder or on the Hub."""
    try:
        yield
    except Exception as error:  # of many unrelated classes, from requests, pyarrow, safetensors and others
        raise UserError(
            f"{kind.capitalize()} {name} could not be loaded ({reason(error)}); {'' if folder else HUB_ADVICE}set "
            f"--vars.{kind} to a folder with {EXPECTED[kind]}."
        ) from error


def local_folder(name: str, kind: str) -> Path | None:
    """Return the folder `name`, or None for an id on the Hub. Raise UserError for any other path."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder; set a folder with {EXPECTED[kind]}, or an id on the Hub.")
    return None


def fetch(kind: str, name: str, revision: str, patterns: Sequence[str]) -> Path:
    """Download files to the Hub's cache, if they are not there; return their folder, whose name is the commit."""
    options = {"repo_type": "dataset" if kind == "dataset" else "model", "allow_patterns": patterns}
    # "*" in a pattern also matches a slash
    return Path(snapshot_download(name, revision=revision, ignore_patterns="*/*", **options))


def read_data(
    dataset: str, config: str, revision: str, lang: str, splits: Sequence[str] = SPLITS
) -> tuple[Sentences, Record]:
    """Read the splits of a folder of TSV files, a folder in the Hub's layout, or a dataset on the Hub.

    Return the sentences and the source for provenance.json. Raises UserError for data that is broken or unlike PAN-X.
    """
    folder = local_folder(dataset, "dataset")
    where, commit = f"{dataset}, config {config}", None
    if folder and any(folder.glob("*.tsv")):
        data = {split: read_tsv(split_path(folder, split, lang)) for split in splits}
    else:
        with explained("dataset", where, folder), tempfile.TemporaryDirectory() as temporary:
            from datasets import load_dataset_builder

            # the usual cache would miss that a file in a folder has changed
            path, cache = (str(folder.resolve()), temporary) if folder else (dataset, None)
            commit = None if folder else fetch("dataset", dataset, revision, ["README.md"]).name
            builder = load_dataset_builder(path, config, revision=commit, cache_dir=cache)
            # without a connection, `datasets` takes the newest revision in its cache
            if commit and builder.hash != commit:
                raise ValueError(f"the Hub did not answer, and the cache has revision {builder.hash}")
            builder.download_and_prepare()
            rows = builder.as_dataset(in_memory=True)
        if missing := [split for split in splits if split not in rows]:
            raise UserError(f"Dataset {where}: no split {missing[0]}, only {', '.join(rows)}; add it.")
        data = {split: _sentences(rows[split], f"Dataset {where}, split {split}") for split in splits}
    counts = {split: {"sha256": digest(some), "sentences": len(some)} for split, some in data.items()}
    source = folder.resolve().name if folder else dataset
    return data, {"source": source, "config": config, "commit": commit, "splits": counts}


def _sentences(rows: Any, where: str) -> list[Sentence]:
    from datasets import ClassLabel, Value

    word, tag = (getattr(rows.features.get(column), "feature", None) for column in ("tokens", "ner_tags"))
    if not (isinstance(word, Value) and word.dtype.endswith("string") and isinstance(tag, ClassLabel)):
        raise UserError(
            f"{where}: the columns are {dict(rows.features)}; expected lists, tokens of string and ner_tags of "
            "ClassLabel, which names the tags: rename or convert them."
        )
    check_tags(tag.names, where)
    sentences = []
    for number, (words, ids) in enumerate(zip(rows["tokens"][:], rows["ner_tags"][:], strict=True)):
        aligned = words and ids and len(words) == len(ids)
        if not aligned or set(ids) - {*range(len(tag.names))} or any(w is None or {"\t", "\n"} & {*w} for w in words):
            raise UserError(
                f"{where}, row {number} (from 0): tokens {words}, ner_tags {ids}; expected one tag per token, tags "
                f"from 0 to {len(tag.names) - 1}, and no tab or line end in a token: correct or remove the row."
            )
        sentences.append(Sentence(tuple(words), tuple(tag.names[i] for i in ids)))
    return sentences


def compare(found: Record, config: str, checksums: Path) -> list[str]:
    """Return how each split in `found` differs from the JSON file `checksums`; warn if that does not have `config`."""
    try:
        expected = json.loads(checksums.read_bytes()).get(config)
        if expected is None:
            msg.warn(f"{checksums} has no checksums for {config}: the content of the data is not verified.")
            return []
        return [
            f"{split}: SHA-256 {found[split]['sha256']} with {found[split]['sentences']} sentences, "
            f"expected {expected[split]['sha256']} with {expected[split]['sentences']}"
            for split in SPLITS
            if found[split]["sha256"] != expected[split]["sha256"]
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        form = f'{{"{config}": {{"train": {{"sha256": …, "sentences": …}}, …}}}}'
        raise UserError(f"{checksums}: expected JSON {form} ({error!r}); restore it.") from error


def read_extra(extra_train: str, dataset: str, revision: str) -> tuple[Sentences, list[Record]]:
    """Read the training sentences of each folder, or config of `dataset`, in `extra_train`, as read_data does."""
    sentences, records = {}, []
    for word in shlex.split(extra_train):
        folder = local_folder(word, "dataset")
        source, name = (word, folder.resolve().name) if folder else (dataset, word)
        lang = name.rpartition(".")[2]  # PAN-X.es
        if folder and len(files := list(folder.glob("train-*.tsv"))) == 1:
            lang = files[0].stem.removeprefix("train-")
        if name in sentences:
            raise UserError(f"extra_train: {name} is given twice; name each folder or config once.")
        tsv = local_folder(source, "dataset")
        if not folder and tsv and any(tsv.glob("*.tsv")) and not (tsv / f"train-{lang}.tsv").is_file():
            raise UserError(f"extra_train: {name} is no folder, and {tsv} has no train-{lang}.tsv; name one of them.")
        data, record = read_data(source, name, revision, lang, ("train",))
        sentences[name] = data["train"]
        records.append(record)
    return sentences, records


def check_encoder(folder: Path, name: str) -> None:
    """Raise UserError unless transformers and spacy-transformers can load the encoder; reads no weights."""
    with explained("encoder", name, folder):
        weights, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
        if index.is_file() and not (folder / "model.safetensors").is_file():
            weights = set(json.loads(index.read_bytes())["weight_map"].values())
        for file in weights:
            with safe_open(folder / file, "np"):  # compares the file's size with its header
                pass
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
        if keys := [key for key in ("vocab_file", "tokenizer_file", "merges_file", "spm_file") if settings.get(key)]:
            raise ValueError(f"tokenizer_config.json names a file, which could be any: remove {keys[0]}")
        from transformers import AutoConfig, AutoTokenizer

        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; add a tokenizer.json")
        if hasattr(tokenizer, "vocab_file") and not tokenizer.vocab_file:
            missing = tokenizer.vocab_files_names["vocab_file"]
            remedy = 'add it, or set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
            raise ValueError(f"no {missing}, which spacy-transformers opens: {remedy}")


def read_encoder(encoder: str, revision: str) -> tuple[list[Path], Record]:
    """Return the files of an encoder, downloaded if it is on the Hub, and its source for provenance.json."""
    source = folder = local_folder(encoder, "encoder")
    if source is None:
        with explained("encoder", encoder):
            source = fetch("encoder", encoder, revision, ENCODER_FILES)
    check_encoder(source, encoder)
    files = sorted({file for pattern in ENCODER_FILES for file in source.glob(pattern) if file.is_file()})
    hashes = {}
    for file in files:
        with file.open("rb") as reader:
            hashes[file.name] = hashlib.file_digest(reader, "sha256").hexdigest()
    name, commit = (folder.resolve().name, None) if folder else (encoder, source.name)
    return files, {"source": name, "commit": commit, "files": hashes}


@one_sentence()
def main(
    dataset: Annotated[str, typer.Option(help="Dataset on the Hub, or a folder of TSV files or in the Hub's layout")],
    dataset_config: Annotated[str, typer.Option(help="The dataset's config, for example PAN-X.it")],
    dataset_revision: Annotated[str, typer.Option(help="The dataset's commit on the Hub")],
    encoder: Annotated[str, typer.Option(help="Model on the Hub, or a folder as save_pretrained() writes it")],
    encoder_revision: Annotated[str, typer.Option(help="The model's commit on the Hub")],
    lang: Annotated[str, typer.Option(help="Language in the names of TSV files: train-LANG.tsv")],
    output: Annotated[Path, typer.Option(help="Folder for data, extra_train, encoder and provenance.json")],
    checksums: Annotated[Path, typer.Option(help="JSON file with the expected content of each config")],
    allow_other_data: Annotated[
        Literal["true", "false"], typer.Option(case_sensitive=False, help="Whether to use data with other content")
    ] = "false",
    extra_train: Annotated[str, typer.Option(help="Further folders or configs to train on, separated by spaces")] = "",
) -> None:
    """Copy the data and the encoder, from the Hugging Face Hub or from local folders, to the assets folder."""
    data, data_record = read_data(dataset, dataset_config, dataset_revision, lang)
    if differing := compare(data_record["splits"], dataset_config, checksums):
        message = f"{dataset}, config {dataset_config}, differs from {checksums}: {'; '.join(differing)}"
        if allow_other_data == "false":
            raise UserError(f"{message}; set another --vars.dataset, or --vars.allow_other_data true.")
        msg.warn(f"{message}; used because allow_other_data is true.")
    extra, extra_records = read_extra(extra_train, dataset, dataset_revision)
    files, encoder_record = read_encoder(encoder, encoder_revision)
    provenance = {"data": data_record, "extra_train": extra_records, "encoder": encoder_record}
    with contextlib.ExitStack() as stack:  # everything goes to temporary paths first
        for name, sentences in (("data", data), ("extra_train", extra)):
            folder = stack.enter_context(replacing(output / name))
            folder.mkdir()
            for part, some in sentences.items():
                (folder / f"{part}.tsv").write_bytes(to_tsv(some))
        folder = stack.enter_context(replacing(output / "encoder"))
        folder.mkdir()
        for file in files:
            shutil.copyfile(file, folder / file.name)
        path = stack.enter_context(replacing(output / "provenance.json"))
        path.write_text(json.dumps(provenance, indent=2) + "\n")
    counts = ", ".join(f"{len(some):,} {name}" for name, some in [*data.items(), *extra.items()])
    msg.good(f"Data: {dataset}, sentences: {counts}")
    msg.good(f"Encoder: {encoder}, {len(files)} files")


if __name__ == "__main__":
    typer.run(main)
