"""A pinned snapshot of the data and of the encoder in the assets folder, from the Hub or from local folders."""

import codecs
import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.panx import SPLITS, TAGS, Sentence, check_tags, read_tsv, split_path, to_tsv

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

# `datasets` and `huggingface_hub` are imported where they're used: slow, and a run on TSV files needs neither

INSTEAD = {
    "dataset": "--vars.dataset FOLDER (TSV files, or Parquet files in the Hub's layout)",
    "encoder": "--vars.encoder FOLDER (config.json, a tokenizer and model.safetensors)",
}
# what AutoModel and AutoTokenizer read, and the licence; pickled weights and code are never taken along
ENCODER_FILES = (
    "LICENSE*",
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.txt", "vocab.json")
# tokenizer classes with a `vocab_file`, which spacy-transformers opens even where tokenizer.json says it all
VOCAB_FILES = {
    "AlbertTokenizer": "spiece.model",
    "CamembertTokenizer": "sentencepiece.bpe.model",
    "DebertaV2Tokenizer": "spm.model",
    "RemBertTokenizer": "sentencepiece.model",
    "XLMRobertaTokenizer": "sentencepiece.bpe.model",
    "XLNetTokenizer": "spiece.model",
}
COMMIT = re.compile(r"[0-9a-f]{40}")
BLOCK = 1 << 20
CUT_SHORT = "Consistency check failed"  # how huggingface_hub's OSError begins where a file has another size


class HubUnreachable(UserError):
    """The Hub gave no answer, where an answer might have said that all is well; `reason` is a few words."""

    def __init__(self, wanted: Mapping[str, str], reason: str) -> None:
        from huggingface_hub.constants import ENDPOINT

        self.reason = reason
        names = " and ".join(f"{kind} {name}" for kind, name in wanted.items())
        super().__init__(
            f"{names} could not be fetched from the Hub at {ENDPOINT} ({reason}); try again with a connection, or "
            f"do without: set {' and '.join(INSTEAD[kind] for kind in wanted)}, or run `make demo`, which needs no Hub."
        )


@dataclass(frozen=True)
class Data:
    """The three splits as read, with where they came from; `revision` and `commit` only for the Hub."""

    kind: str
    source: str
    config: str
    tags: tuple[str, ...]
    splits: dict[str, list[Sentence]]
    revision: str | None = None
    commit: str | None = None


# sources


def local_folder(name: str, kind: str) -> Path | None:
    """Return the folder that `name` means; None where it means a repository on the Hub. `kind` is dataset or encoder.

    Raises UserError for a path without a folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name}: a file where a folder was expected; set {INSTEAD[kind]}.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: there is no such folder; set {INSTEAD[kind]}, or an id on the Hub.")
    return None


def hub_commit(name: str, kind: str, revision: str | None = None, timeout: float = 10) -> str:
    """Return the commit that a revision of the Hub's dataset or encoder stands for now.

    Raises HubUnreachable without a usable answer (no connection, offline mode, HTTP 429 or 5xx), UserError where there
    is no such repository or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repo_type = "dataset" if kind == "dataset" else "model"
    try:
        return HfApi().repo_info(name, repo_type=repo_type, revision=revision, timeout=timeout).sha
    except HFValidationError:
        raise UserError(f"{name!r} is neither a folder nor an id on the Hub; set {INSTEAD[kind]}, or an id.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"The Hub has no {kind} {name} that may be read without permission; check the name, "
            f"run `huggingface-cli login` for a private one, or set {INSTEAD[kind]}."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"The Hub's {kind} {name} has no revision {revision}; set --vars.{kind}_revision to one of its commits."
        ) from None
    except OSError as error:  # requests' errors are OSErrors, and all of huggingface_hub's too
        raise HubUnreachable({kind: name}, _reason(error)) from None


def _reason(error: BaseException) -> str:
    """Say in a few words why a library gave up, out of an error that may hold a page of text."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if (response := getattr(error, "response", None)) is not None:
        return f"HTTP {response.status_code}"
    if str(error).startswith(CUT_SHORT):
        return "a file came without its end"
    lines = str(error).strip().splitlines()
    return type(error).__name__ if _is_network(error) or not lines else lines[0][:200]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_network(error: BaseException) -> bool:
    libraries = ("requests", "urllib3", "httpx", "huggingface_hub")
    known = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in libraries
    return known or str(error).startswith(CUT_SHORT)


def _raise_for_disk(error: BaseException) -> None:
    """Raise the system's refusal to write that a library's error may hide: no other source mends it."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise cause


# data


def read_data(dataset: str, config: str, revision: str, lang: str) -> Data:
    """Read the three splits of a folder of TSV files, of a folder in the Hub's layout, or of a dataset on the Hub.

    Raises UserError for a source that isn't there or can't be read, and for content other than PAN-X's.
    """
    folder = local_folder(dataset, "dataset")
    if folder is None:
        return _read_hub(dataset, config, revision)
    name = folder.resolve().name
    if any((folder / file).is_file() for split in SPLITS for file in (f"{split}-{lang}.tsv", f"{split}.tsv")):
        splits = {split: read_tsv(split_path(folder, split, lang)) for split in SPLITS}
        return Data("tsv", name, config, TAGS, splits)
    if not (folder / "README.md").is_file() and not any(folder.rglob("*.parquet")):
        raise UserError(
            f"{folder}: neither TSV files (train-{lang}.tsv or train.tsv, and so on) nor a README.md with Parquet "
            f"files is there; set {INSTEAD['dataset']}."
        )
    where = f"{folder}, config {config}"
    # a cache of its own: the usual one knows a local file only by its path and time of change
    with tempfile.TemporaryDirectory() as cache:
        tags, splits = _read_splits(_load(str(folder.resolve()), config, None, cache, where), where)
    return Data("folder", name, config, tags, splits)


def _read_hub(dataset: str, config: str, revision: str) -> Data:
    where = f"dataset {dataset}, config {config}"
    unreachable = None
    wanted = revision
    try:
        wanted = hub_commit(dataset, "dataset", revision)
    except HubUnreachable as error:
        # the same commit may be in this machine's cache; `datasets` reads the variable when it is imported
        unreachable = error
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        builder = _load(dataset, config, revision, None, where)
    except UserError as error:
        network = next(filter(_is_network, _causes(error.__cause__)), None)
        if unreachable is None and network is not None:
            unreachable = HubUnreachable({"dataset": dataset}, _reason(network))
        _refuse_altered(dataset, wanted)
        raise unreachable or error from None
    try:
        _refuse_altered(dataset, wanted)
    except UserError:
        shutil.rmtree(builder.cache_dir)  # what was made of it
        raise
    # `datasets` takes the newest revision in its cache, whichever was asked for, when the Hub does not answer
    if COMMIT.fullmatch(wanted) and builder.hash != wanted:
        raise unreachable or HubUnreachable({"dataset": dataset}, "the connection broke off")
    tags, splits = _read_splits(builder, where)
    return Data("hub", dataset, config, tags, splits, revision, builder.hash)


def _refuse_altered(dataset: str, commit: str) -> None:
    """Remove from this machine's cache of the Hub the dataset's files that are not what the Hub announced, which every
    further run would read again; raise UserError if there is one.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=dataset, repo_type="dataset") / "snapshots"
    for file in sorted((snapshots / commit).rglob("*")):
        original = file.resolve()
        if original.is_file() and (named := _naming_hash(original)):
            with original.open("rb") as reader:
                found = hashlib.file_digest(reader, lambda named=named: named).hexdigest()
            if found != original.name:
                _remove_altered(file, f"Dataset file {file.relative_to(snapshots / commit)}", found)


def _naming_hash(original: Path) -> "hashlib._Hash | None":
    """Return the new hash by which the Hub's cache names a file: large ones by their SHA-256, small ones by Git's
    SHA-1; None where there are no symbolic links, and so no such names.
    """
    if len(original.name) == 40:
        return hashlib.sha1(b"blob %d\0" % original.stat().st_size, usedforsecurity=False)
    return hashlib.sha256() if len(original.name) == 64 else None


def _remove_altered(file: Path, name: str, found: str) -> NoReturn:
    original = file.resolve()
    file.unlink()
    original.unlink(missing_ok=True)
    raise UserError(
        f"{name}: its hash is {found}, the Hub announced {original.name}; it is removed from the Hub's cache, run the "
        "command again."
    )


def _load(path: str, config: str, revision: str | None, cache: str | None, where: str) -> "DatasetBuilder":
    """Do what datasets.load_dataset does, except for its last step: its result wouldn't tell the commit."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(path, config, revision=revision, cache_dir=cache)
        builder.download_and_prepare()
        return builder
    except Exception as error:  # of a dozen unrelated classes: datasets', pyarrow's, yaml's, requests', built-in ones
        _raise_for_disk(error)
        # "An error occurred while generating the dataset" says little: its cause has the facts
        raise UserError(
            f"{where}: could not be loaded ({_reason(error.__cause__ or error)}); expected a README.md with this "
            f"config and Parquet files with the splits {', '.join(SPLITS)}: mend it, or set {INSTEAD['dataset']}."
        ) from error


def _read_splits(builder: "DatasetBuilder", where: str) -> tuple[tuple[str, ...], dict[str, list[Sentence]]]:
    """Return the tag names in their order, and the sentences."""
    there = builder.info.splits
    for split in SPLITS:
        if split not in there:
            raise UserError(
                f"{where}: no split {split}, only {', '.join(there)}; set a dataset with {', '.join(SPLITS)}."
            )
        if not there[split].num_examples:
            raise UserError(f"{where}, split {split}: empty; expected at least one sentence: give all three splits.")
    splits = {}
    for split in SPLITS:
        rows = builder.as_dataset(split)
        tags = _tag_names(rows, f"{where}, split {split}")
        splits[split] = _sentences(rows, tags, f"{where}, split {split}")
    return tags, splits


def _tag_names(rows: "Dataset", where: str) -> tuple[str, ...]:
    from datasets import ClassLabel, Value

    expected = "expected tokens (a list of strings) and ner_tags (a list of ClassLabel)"
    for column in ("tokens", "ner_tags"):
        if column not in rows.features:
            raise UserError(f"{where}: no column {column}, only {', '.join(rows.features)}; {expected}: rename it.")
    tokens, tags = (getattr(rows.features[column], "feature", None) for column in ("tokens", "ner_tags"))
    if not (isinstance(tokens, Value) and tokens.dtype in ("string", "large_string")):
        raise UserError(f"{where}: column tokens is {rows.features['tokens']}; {expected}: convert it.")
    if not isinstance(tags, ClassLabel):
        raise UserError(
            f"{where}: column ner_tags is {rows.features['ner_tags']}, so its numbers have no names; {expected}: "
            "write the names into the features."
        )
    check_tags(tags.names, where)
    return tuple(tags.names)


def _sentences(rows: "Dataset", names: Sequence[str], where: str) -> list[Sentence]:
    sentences = []
    columns = rows.select_columns(["tokens", "ner_tags"])[:]
    for number, (words, tags) in enumerate(zip(columns["tokens"], columns["ner_tags"], strict=True)):
        here = f"{where}, row {number} (from 0)"
        if not words or not tags or len(words) != len(tags):
            raise UserError(f"{here}: {len(words or ())} tokens, {len(tags or ())} tags; expected one tag a token.")
        for word in words:
            if word is None or "\t" in word or "\n" in word:
                raise UserError(
                    f"{here}: token {word!r} can't stand in a TSV line; expected no tab and no line end in it: mend it."
                )
        for tag in tags:
            # ClassLabel has -1 for "unlabelled", which would silently index the last name
            if tag is None or not 0 <= tag < len(names):
                raise UserError(
                    f"{here}: tag {tag} has no name; expected 0 to {len(names) - 1}: label or drop the row."
                )
        sentences.append(Sentence(tuple(words), tuple(names[tag] for tag in tags)))
    # a reader takes it for the file's byte order mark
    if sentences[0].words[0].encode().startswith(codecs.BOM_UTF8):
        raise UserError(f"{where}, row 0: the first token begins with U+FEFF, which a TSV file can't: remove it there.")
    return sentences


def compare(found: Mapping[str, Mapping[str, Any]], config: str, checksums: Path) -> list[str]:
    """Say what differs between the splits' `sha256` and `sentences` and those that `checksums` has for `config`.

    Prints a warning where it has none for it. Raises UserError for a file that isn't JSON of that form.
    """
    try:
        expected = json.loads(checksums.read_bytes()).get(config)
        if expected is None:
            msg.warn(f"{checksums} has no sums for {config}, so the data's content is compared with nothing.")
            return []
        return [
            f"{split}: SHA-256 {found[split]['sha256']} with {found[split]['sentences']} sentences, "
            f"expected {expected[split]['sha256']} with {expected[split]['sentences']}"
            for split in SPLITS
            if found[split]["sha256"] != expected[split]["sha256"]
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{checksums}: expected JSON {{"{config}": {{"train": {{"sha256": …, "sentences": …}}, …}}}} ({error!r}); '
            "restore it."
        ) from None


# encoder


def encoder_files(folder: Path) -> list[Path]:
    """List the files of a Hugging Face folder that are taken along, by name."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in ENCODER_FILES)
    ]


def encoder_problems(folder: Path, name: str) -> list[str]:
    """Give a sentence for each thing that keeps the encoder `name` in `folder` from being loaded; reads no weights."""
    names = {file.name for file in encoder_files(folder)}
    problems = []
    configs = {}
    for file in sorted(names & {"config.json", "tokenizer_config.json", "model.safetensors.index.json"}):
        try:
            configs[file] = json.loads((folder / file).read_bytes())
            if not isinstance(configs[file], dict):
                raise ValueError
        except (ValueError, RecursionError):  # the latter for JSON nested too deep
            configs[file] = {}
            problems.append(f"Encoder {name}: {file} is not a JSON object; put the whole file there again.")
    if "config.json" not in names:
        problems.append(f"Encoder {name}: no config.json; set --vars.encoder to a folder written by save_pretrained().")
    elif configs["config.json"] and "model_type" not in configs["config.json"]:
        problems.append(f"Encoder {name}: config.json has no model_type, which says the model's class; add it.")
    problems += [f"Encoder {name}: {problem}" for problem in _weights_problems(folder, names, configs)]
    problems += [f"Encoder {name}: {problem}" for problem in _tokenizer_problems(names, configs)]
    return problems


def _require_whole(folder: Path, name: str) -> None:
    if problems := encoder_problems(folder, name):
        raise UserError(" ".join(problems))


def _weights_problems(folder: Path, names: set[str], configs: Mapping[str, dict]) -> list[str]:
    weights = ["model.safetensors"]
    if "model.safetensors" not in names and "model.safetensors.index.json" in names:
        weight_map = configs["model.safetensors.index.json"].get("weight_map")
        weights = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not weights or not all(isinstance(file, str) for file in weights):
            return ["model.safetensors.index.json has no weight_map of file names; put the whole file there again."]
        weights = sorted(set(weights))
    elif "model.safetensors" not in names:
        return [
            "no model.safetensors; pickled weights (pytorch_model.bin) are not read, as they can run code: write it "
            "with transformers' save_pretrained(), or choose another encoder or revision."
        ]
    problems = []
    for file in weights:
        if file not in names:
            problems.append(f"{file} is missing, which model.safetensors.index.json names; put it there.")
            continue
        try:
            with safe_open(folder / file, "np"):  # reads the header, and compares the file's size with it
                pass
        except SafetensorError as error:
            problems.append(
                f"{file} is not a whole safetensors file ({error}); cut off, or a Git LFS pointer? Fetch it again."
            )
    return problems


def _tokenizer_problems(names: set[str], configs: Mapping[str, dict]) -> list[str]:
    if not any(fnmatch.fnmatchcase(file, pattern) for file in names for pattern in TOKENIZERS):
        return [
            "no tokenizer; expected tokenizer.json, a SentencePiece .model, vocab.txt, or vocab.json and merges.txt."
        ]
    config = configs.get("tokenizer_config.json", {})
    # as scripts/pipeline/encoder.py, which takes seconds to import, refuses it when a pipeline is loaded
    if named := [name for name in ("vocab_file", "tokenizer_file", "merges_file", "spm_file") if config.get(name)]:
        return [f"tokenizer_config.json names a file of its own ({named[0]}), which could be any; take the entry out."]
    declared = config.get("tokenizer_class")
    declared = declared or configs.get("config.json", {}).get("tokenizer_class")
    if declared == "PreTrainedTokenizerFast":
        return [] if "tokenizer.json" in names else ["no tokenizer.json, which PreTrainedTokenizerFast needs; add it."]
    if declared:
        tokenizer_class = str(declared).removesuffix("Fast")
    else:  # transformers goes by the model type then, "xlm-roberta" for example
        model_type = str(configs.get("config.json", {}).get("model_type")).replace("-", "")
        matching = (known for known in VOCAB_FILES if known.lower() == f"{model_type}tokenizer")
        tokenizer_class = next(matching, None)
    vocab_file = VOCAB_FILES.get(tokenizer_class)
    if vocab_file is None or vocab_file in names:
        return []
    return [
        f"no {vocab_file}, which spacy-transformers opens for every {tokenizer_class}; add it, or, as tokenizer.json "
        'is enough for it, set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json.'
        if "tokenizer.json" in names
        else f"no {vocab_file}, which a {tokenizer_class} is read from; add it."
    ]


def fetch_encoder(encoder: str, revision: str) -> Path:
    """Fetch what is needed; return the snapshot in this machine's cache of the Hub, a folder named after its commit.

    Raises HubUnreachable, and UserError where there is no such repository or revision.
    """
    from huggingface_hub import snapshot_download

    unreachable = None
    try:
        hub_commit(encoder, "encoder", revision)
    except HubUnreachable as error:  # the same commit may be in the cache
        unreachable = error
    try:
        folder = Path(
            snapshot_download(
                encoder,
                revision=revision,
                allow_patterns=list(ENCODER_FILES),
                ignore_patterns="*/*",  # * in a pattern also matches a slash
                local_files_only=unreachable is not None,
            )
        )
    except Exception as error:  # requests', huggingface_hub's, hf_xet's
        _raise_for_disk(error)
        raise unreachable or HubUnreachable({"encoder": encoder}, f"{_reason(error)}; what came is kept") from None
    if unreachable and encoder_problems(folder, encoder):  # an earlier download was cut off
        raise unreachable
    return folder


def copy_encoder(source: Path, target: Path, *, from_cache: bool) -> dict[str, dict[str, Any]]:
    """Copy the encoder's files into the new folder `target`; give their bytes and SHA-256 by name.

    The files of the Hub's cache (`from_cache`) are linked where the file system allows it: they are named by their hash
    and never written again. A file there with another hash is removed from the cache and raises UserError.
    """
    target.mkdir()
    files = encoder_files(source)
    record = {}
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, desc="Encoder") as bar:
        for file in files:
            original = file.resolve()
            size = original.stat().st_size
            linked = from_cache and _linked(original, target / file.name)
            sha256 = hashlib.sha256()
            named = _naming_hash(original) if from_cache else None
            with contextlib.ExitStack() as stack:
                reader = stack.enter_context(original.open("rb"))
                writer = None if linked else stack.enter_context((target / file.name).open("wb"))
                while block := reader.read(BLOCK):
                    sha256.update(block)
                    if named:
                        named.update(block)
                    if writer:
                        writer.write(block)
                    bar.update(len(block))
            if named and named.hexdigest() != original.name:
                _remove_altered(file, f"Encoder file {file.name}", named.hexdigest())
            record[file.name] = {"bytes": size, "sha256": sha256.hexdigest()}
    return record


def _linked(original: Path, target: Path) -> bool:
    try:
        os.link(original, target)
    except OSError:  # another file system, or one without hard links
        return False
    return True


# the assets


def recorded(assets: Path, part: str, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return provenance.json's record of `part`, data or encoder, if it answers `request` and its files are unchanged.

    None if anything differs: another request, a missing, changed or additional file, no record or a broken one.
    """
    folder = assets / part
    try:
        record = json.loads((assets / "provenance.json").read_bytes())[part]
        same = all(record[key] == value for key, value in request.items())
        if not same or {file.name for file in folder.iterdir()} != set(record["files"]):
            return None
        for name, entry in record["files"].items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record


def _data_record(data: Data, names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Make the data's entry in provenance.json, and the files it tells of; `names` gives each split's file name."""
    contents = {name: to_tsv(data.splits[split]) for split, name in names.items()}
    files = {
        name: {
            "bytes": len(contents[name]),
            "sha256": hashlib.sha256(contents[name]).hexdigest(),
            "sentences": len(data.splits[split]),
            "tokens": sum(len(sentence.words) for sentence in data.splits[split]),
        }
        for split, name in names.items()
    }
    record = {
        "kind": data.kind,
        "source": data.source,
        "config": data.config,
        "revision": data.revision,
        "commit": data.commit,
        "tags": list(data.tags),
        "files": files,
    }
    return record, contents


def read_extra(
    extra_train: Sequence[str], dataset: str, revision: str, output: Path
) -> tuple[list[dict[str, Any]], dict[str, bytes] | None]:
    """Read the training sentences of further PAN-X folders, or of further configs of the same dataset.

    Return their entries in provenance.json and the files those tell of, None for the files where `output` has exactly
    them already. Raises UserError for what read_data refuses, and for two of one name.
    """
    requests, records, contents = [], [], {}
    for extra in extra_train:
        # a config's name has no slash in it: what is no folder is one
        folder = local_folder(extra, "dataset")
        source = extra if folder else dataset
        config = folder.resolve().name if folder else extra
        if any(request["config"] == config for request in requests):
            raise UserError(f"extra_train: {config} is there twice; give each folder or config once.")
        kind = "folder" if folder or local_folder(dataset, "dataset") else "hub"
        requests.append({"kind": kind, "source": source, "config": config, "revision": revision})
    keys = ("kind", "source", "config", "revision")
    try:
        there = json.loads((output / "provenance.json").read_bytes())["extra_train"]
        asked = [{key: record[key] for key in keys} for record in there] == requests
        hashes = {name: entry["sha256"] for record in there for name, entry in record["files"].items()}
        files = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (output / "extra_train").iterdir()
        }
        if asked and files == hashes and all(request["kind"] == "hub" for request in requests):
            return there, None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # no record or a broken one: read it anew
    for request in requests:
        source, config = request["source"], request["config"]
        lang = config.rpartition(".")[2]
        if source != dataset:
            languages = {file.stem.rpartition("-")[2] for file in Path(source).glob("train-*.tsv")}
            lang = languages.pop() if len(languages) == 1 else lang
        record, content = _data_record(read_data(source, config, revision, lang), {"train": f"{config}.tsv"})
        records.append(record)
        contents |= content
    return records, contents


def download(
    *,
    dataset: str,
    dataset_config: str,
    dataset_revision: str,
    encoder: str,
    encoder_revision: str,
    lang: str,
    output: Path,
    checksums: Path,
    allow_other_data: bool,
    extra_train: Sequence[str] = (),
) -> None:
    """Put the data, the encoder and provenance.json into `output`; what is there from the Hub already, stays.

    Raises UserError, with `output` as it was, for a source that isn't there, is incomplete or, unless
    `allow_other_data`, has other content than `checksums` says; OSError as the file system does.
    """
    data_folder = local_folder(dataset, "dataset")
    encoder_folder = local_folder(encoder, "encoder")
    if encoder_folder is not None:
        _require_whole(encoder_folder, encoder)

    request = {"kind": "hub", "source": dataset, "config": dataset_config, "revision": dataset_revision}
    data_record = None if data_folder else recorded(output, "data", request)
    contents: dict[str, bytes] | None = None
    if data_record is None:
        data_record, contents = _data_record(
            read_data(dataset, dataset_config, dataset_revision, lang), {split: f"{split}.tsv" for split in SPLITS}
        )
    found = {split: data_record["files"][f"{split}.tsv"] for split in SPLITS}
    if differing := compare(found, dataset_config, checksums):
        message = f"{dataset}, config {dataset_config}, has other content than {checksums} says: {'; '.join(differing)}"
        if not allow_other_data:
            raise UserError(f"{message}; set the dataset meant, or --vars.allow_other_data true.")
        msg.warn(f"{message}; taken because allow_other_data is true.")
    total = " + ".join(f"{found[split]['sentences']:,} {split}" for split in SPLITS)
    msg.good(f"Data: {dataset}, {total} sentences{', already there, verified' if contents is None else ''}")

    extra_records, extra_contents = read_extra(extra_train, dataset, dataset_revision, output)
    for extra in extra_records:
        (count,) = (entry["sentences"] for entry in extra["files"].values())
        msg.good(f"Further training data: {extra['config']}, {count:,} sentences")

    request = {"kind": "hub", "source": encoder, "revision": encoder_revision}
    encoder_record = None if encoder_folder else recorded(output, "encoder", request)
    encoder_source = encoder_folder
    if encoder_folder is not None:
        name = encoder_folder.resolve().name
        encoder_record = {"kind": "folder", "source": name, "revision": None, "commit": None}
    elif encoder_record is None:
        encoder_source = fetch_encoder(encoder, encoder_revision)
        _require_whole(encoder_source, encoder)
        encoder_record = {**request, "commit": encoder_source.name}
    else:
        msg.good(f"Encoder: {encoder}, already there, verified")

    if contents is None and extra_contents is None and encoder_source is None:
        return
    with contextlib.ExitStack() as stack:
        # the long part goes to temporary folders; on leaving the stack both are renamed
        if contents is not None:
            data_target = stack.enter_context(replacing(output / "data"))
            data_target.mkdir()
            for name, content in contents.items():
                (data_target / name).write_bytes(content)
        if extra_contents is not None:
            # made also where there is none, so that the next command finds what it depends on
            extra_target = stack.enter_context(replacing(output / "extra_train"))
            extra_target.mkdir()
            for name, content in extra_contents.items():
                (extra_target / name).write_bytes(content)
        if encoder_source is not None:
            encoder_target = stack.enter_context(replacing(output / "encoder"))
            encoder_record["files"] = copy_encoder(encoder_source, encoder_target, from_cache=encoder_folder is None)
            _require_whole(encoder_target, encoder)  # the source may have changed while it was read
        (output / "provenance.json").unlink(missing_ok=True)
    with replacing(output / "provenance.json") as path:
        provenance = {"data": data_record, "extra_train": extra_records, "encoder": encoder_record}
        path.write_text(json.dumps(provenance, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if encoder_source is not None:
        msg.good(f"Encoder: {encoder}, {len(encoder_record['files'])} files")
    msg.good(f"Where it all came from: {output / 'provenance.json'}")


def main(
    allow_other_data: Annotated[
        bool, typer.Argument(help="true: take data with other content too", show_default=False)
    ],
    dataset: Annotated[str, typer.Option(help="Dataset on the Hub, or a folder of TSV files or in the Hub's layout")],
    dataset_config: Annotated[str, typer.Option(help="The dataset's config, for example PAN-X.it")],
    dataset_revision: Annotated[str, typer.Option(help="The dataset's commit on the Hub")],
    encoder: Annotated[str, typer.Option(help="Model on the Hub, or a folder as save_pretrained() writes it")],
    encoder_revision: Annotated[str, typer.Option(help="The model's commit on the Hub")],
    lang: Annotated[str, typer.Option(help="Language in the names of TSV files: train-LANG.tsv")],
    output: Annotated[Path, typer.Option(help="Folder for data/, encoder/ and provenance.json")],
    checksums: Annotated[Path, typer.Option(help="JSON file with the expected content of each config")],
    extra_train: Annotated[
        list[str] | None, typer.Argument(help="Further folders or configs, for training only", show_default=False)
    ] = None,
) -> None:
    """Put a pinned snapshot of the data and of the encoder into the assets folder."""
    with one_sentence():
        download(
            dataset=dataset,
            dataset_config=dataset_config,
            dataset_revision=dataset_revision,
            encoder=encoder,
            encoder_revision=encoder_revision,
            lang=lang,
            output=output,
            checksums=checksums,
            allow_other_data=allow_other_data,
            extra_train=extra_train or (),
        )


if __name__ == "__main__":
    typer.run(main)
