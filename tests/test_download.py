import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy
import pytest
from safetensors.numpy import save_file

from scripts import download as module
from scripts.common import UserError, replacing
from scripts.download import copy_encoder, download, encoder_problems, recorded
from scripts.panx import SPLITS, TAGS, Sentence, digest, read_tsv, to_tsv

ROOT = Path(__file__).parents[1]
SLOW = pytest.mark.skipif("FAULTS" not in os.environ, reason="make test-faults runs it")
COMMIT = "1234567890abcdef1234567890abcdef12345678"
NAMES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")  # as on the Hub: another order than panx.TAGS
SENTENCES = {
    "train": [
        Sentence(("Piera", "Calzolai", "abita", "a", "Nuoro"), ("B-PER", "I-PER", "O", "O", "B-LOC")),
        Sentence(("la", "Filanda", "Rossi"), ("O", "B-ORG", "I-ORG")),
    ],
    "validation": [Sentence(("d'Otranto", "\u2028"), ("B-LOC", "O"))],
    "test": [Sentence(("Nuoro",), ("B-LOC",)), Sentence(("``", "Piera", "''"), ("O", "B-PER", "O"))],
}


def write_tsv(folder: Path, sentences=SENTENCES, name="{split}-it.tsv"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, some in sentences.items():
        (folder / name.format(split=split)).write_bytes(to_tsv(some))
    return folder


def hub_layout(folder: Path, sentences=SENTENCES, names=NAMES, config="PAN-X.it"):
    columns = {
        split: {
            "tokens": [list(s.words) for s in some],
            "ner_tags": [[names.index(tag) for tag in s.tags] for s in some],
            "langs": [["it"] * len(s.words) for s in some],
        }
        for split, some in sentences.items()
    }
    return write_parquet(folder, columns, datasets.List(datasets.ClassLabel(names=list(names))), config=config)


def write_parquet(folder: Path, columns, tags, tokens=None, config="PAN-X.it"):
    types = {
        "tokens": tokens or datasets.List(datasets.Value("string")),
        "ner_tags": tags,
        "langs": datasets.List(datasets.Value("string")),
    }
    (folder / config).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, data in columns.items():
        features = datasets.Features({column: types[column] for column in data})
        rows = datasets.Dataset.from_dict(data, features=features)
        rows.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def write_encoder(folder: Path, **configs):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | configs.get("config", {})))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | configs.get("tokenizer", {}))
    )
    (folder / "tokenizer.json").write_text("{}")
    save_file({"w": numpy.arange(6, dtype="float32")}, folder / "model.safetensors")
    return folder


def entry(sentences):
    return {split: {"sha256": digest(some), "sentences": len(some)} for split, some in sentences.items()}


@pytest.fixture
def run(tmp_path):
    """Calls download() with good local sources, those of them replaced that a test names; gives the output folder."""

    def call(expected=SENTENCES, **options):
        checksums = tmp_path / "checksums.json"
        checksums.write_text(json.dumps({"PAN-X.it": entry(expected)}))
        if "encoder" not in options:
            options["encoder"] = str(write_encoder(tmp_path / "tiny"))
        if "dataset" not in options:
            options["dataset"] = str(write_tsv(tmp_path / "tsv"))
        defaults = {
            "dataset_config": "PAN-X.it",
            "dataset_revision": COMMIT,
            "encoder_revision": COMMIT,
            "lang": "it",
            "output": tmp_path / "assets",
            "checksums": checksums,
            "allow_other_data": False,
        }
        download(**(defaults | options))
        return tmp_path / "assets"

    return call


def snapshot(folder: Path):
    """Every file below the folder with its content: equal before and after if nothing was touched or left behind."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(text: str) -> str:
    return " ".join(text.split())


# data


SPANISH = {split: [Sentence((f"Cádiz-{split}",), ("B-LOC",))] for split in SPLITS}


@pytest.mark.parametrize("way", ["config of the same folder", "folder"])
def test_training_sentences_of_another_language_are_kept_beside_the_data(run, tmp_path, way):
    dataset = write_tsv(tmp_path / "tsv")
    folder = dataset if way != "folder" else tmp_path / "spagnolo"
    write_tsv(folder, SPANISH, name="{split}-es.tsv")
    extra = "PAN-X.es" if way != "folder" else str(folder)
    assets = run(dataset=str(dataset), extra_train=[extra])
    name = "PAN-X.es.tsv" if way != "folder" else "spagnolo.tsv"
    assert {path.name for path in (assets / "extra_train").iterdir()} == {name}
    assert read_tsv(assets / "extra_train" / name) == SPANISH["train"]
    assert read_tsv(assets / "data" / "train.tsv") == SENTENCES["train"]
    (record,) = json.loads((assets / "provenance.json").read_text())["extra_train"]
    assert record["files"][name]["sentences"] == 1


def test_without_further_data_what_an_earlier_run_added_goes_away(run, tmp_path):
    write_tsv(tmp_path / "tsv")
    write_tsv(tmp_path / "tsv", SPANISH, name="{split}-es.tsv")
    run(extra_train=["PAN-X.es"])
    assets = run()
    assert list((assets / "extra_train").iterdir()) == []


def test_further_data_given_twice_is_refused(run, tmp_path):
    write_tsv(tmp_path / "tsv", SPANISH, name="{split}-es.tsv")
    with pytest.raises(UserError, match="PAN-X.es is there twice"):
        run(dataset=str(write_tsv(tmp_path / "tsv")), extra_train=["PAN-X.es", "PAN-X.es"])


@pytest.mark.parametrize("name", ["{split}-it.tsv", "{split}.tsv"])
def test_tsv_folder_arrives_byte_for_byte(run, tmp_path, name):
    assets = run(dataset=str(write_tsv(tmp_path / "mine", name=name)))
    for split in SPLITS:
        assert (assets / "data" / f"{split}.tsv").read_bytes() == to_tsv(SENTENCES[split])
        assert read_tsv(assets / "data" / f"{split}.tsv") == SENTENCES[split]


def test_parquet_tags_come_from_the_features_in_any_order(run, tmp_path):
    for number, names in enumerate((NAMES, TAGS, NAMES[::-1])):
        assets = run(dataset=str(hub_layout(tmp_path / f"hub{number}", names=names)))
        assert read_tsv(assets / "data" / "train.tsv") == SENTENCES["train"]
        assert json.loads((assets / "provenance.json").read_text())["data"]["tags"] == list(names)


def test_changed_parquet_under_the_same_name_is_read_again(run, tmp_path):
    folder = hub_layout(tmp_path / "hub")
    run(dataset=str(folder))
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    other = hub_layout(tmp_path / "other", sentences=SENTENCES | {"train": SENTENCES["train"][:1]})
    for path, modified in times.items():
        path.write_bytes((other / path.relative_to(folder)).read_bytes())
        os.utime(path, ns=(modified, modified))
    assets = run(dataset=str(folder), allow_other_data=True)
    assert read_tsv(assets / "data" / "train.tsv") == SENTENCES["train"][:1]


LABELS = datasets.List(datasets.ClassLabel(names=list(NAMES)))
GOOD = {"tokens": [["Nuoro"]], "ner_tags": [[5]]}


@pytest.mark.parametrize(
    ("train", "types", "sentence"),
    [
        ({"tokens": [["Nuoro"]]}, {}, "split train: no column ner_tags, only tokens; expected"),
        ({"ner_tags": [[5]]}, {}, "split train: no column tokens, only ner_tags; expected"),
        (GOOD, {"tags": datasets.List(datasets.Value("int64"))}, "so its numbers have no names; expected"),
        ({**GOOD, "ner_tags": [5]}, {"tags": datasets.ClassLabel(names=list(NAMES))}, "a list of ClassLabel"),
        ({**GOOD, "tokens": [[1]]}, {"tokens": datasets.List(datasets.Value("int64"))}, "a list of strings"),
        (
            GOOD,
            {"tags": datasets.List(datasets.ClassLabel(names=[*NAMES, "B-MISC"]))},
            "unknown tag 'B-MISC'; expected",
        ),
        ({"tokens": [], "ner_tags": []}, {}, "split train: empty; expected"),
        (
            {"tokens": [["a"], ["a", "b"]], "ner_tags": [[0], [0]]},
            {},
            "train, row 1 (from 0): 2 tokens, 1 tags; expected",
        ),
        ({"tokens": [["a"], []], "ner_tags": [[0], []]}, {}, "train, row 1 (from 0): 0 tokens, 0 tags; expected"),
        ({"tokens": [["a\tb"]], "ner_tags": [[0]]}, {}, r"train, row 0 (from 0): token 'a\tb' can't stand"),
        ({"tokens": [["a"], ["b\n"]], "ner_tags": [[0], [0]]}, {}, r"train, row 1 (from 0): token 'b\n' can't stand"),
        ({"tokens": [[None]], "ner_tags": [[0]]}, {}, "train, row 0 (from 0): token None can't stand"),
        ({"tokens": [["\ufeffa"]], "ner_tags": [[0]]}, {}, "U+FEFF"),
        ({"tokens": [["a"]], "ner_tags": [[-1]]}, {}, "train, row 0 (from 0): tag -1 has no name; expected 0 to 6"),
        ({"tokens": [["a"]], "ner_tags": [[None]]}, {}, "train, row 0 (from 0): tag None has no name; expected 0 to 6"),
    ],
)
def test_parquet_unlike_panx_is_named_with_split_and_row(run, tmp_path, train, types, sentence):
    columns = {"train": train, "validation": GOOD, "test": GOOD}
    if "tags" in types or "tokens" in types or len(train) == 1:
        columns = dict.fromkeys(SPLITS, train)
    folder = write_parquet(tmp_path / "hub", columns, types.get("tags", LABELS), types.get("tokens"))
    with pytest.raises(UserError) as error:
        run(dataset=str(folder), allow_other_data=True)
    assert str(folder) in str(error.value)
    assert sentence in str(error.value)
    assert not (tmp_path / "assets").exists()


def test_parquet_with_a_missing_split_names_it(run, tmp_path):
    folder = hub_layout(tmp_path / "hub", sentences={split: SENTENCES[split] for split in ("train", "test")})
    with pytest.raises(UserError, match="no split validation, only train, test; set"):
        run(dataset=str(folder))


def test_parquet_without_the_config_names_those_there(run, tmp_path):
    folder = hub_layout(tmp_path / "hub", config="PAN-X.es")
    with pytest.raises(UserError, match=r"config PAN-X\.it: could not be loaded \(.*PAN-X\.es.*\); expected"):
        run(dataset=str(folder))


def test_parquet_cut_off_is_one_sentence(run, tmp_path):
    folder = hub_layout(tmp_path / "hub")
    path = next(folder.rglob("train*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"could not be loaded \(.*[Pp]arquet.*\); expected"):
        run(dataset=str(folder))


def test_full_disk_is_not_blamed_on_the_dataset(run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        try:
            raise OSError(28, "No space left on device", "/somewhere")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset_builder", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(dataset=str(hub_layout(tmp_path / "hub")))


@pytest.mark.parametrize("option", ["dataset", "encoder"])
@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~/missing-folder", "a/b/c"])
def test_missing_folder_is_not_looked_for_on_the_hub(run, option, name):
    with pytest.raises(UserError, match=f"^{re.escape(name)}: there is no such folder; set --vars.{option} FOLDER"):
        run(**{option: name})


def test_folder_with_neither_form_of_data(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither TSV files .* nor a README.md with Parquet files"):
        run(dataset=str(tmp_path / "empty"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file where a folder was expected"):
        run(dataset=str(tmp_path / "file"))


def test_tsv_folder_lacking_a_split_names_both_file_names(run, tmp_path):
    folder = write_tsv(tmp_path / "mine", {split: SENTENCES[split] for split in ("train", "test")})
    with pytest.raises(UserError, match=r"neither validation-it\.tsv nor validation\.tsv"):
        run(dataset=str(folder))


# the expected content


def test_other_data_stops_with_both_sums_and_counts_of_each_split(run, tmp_path):
    expected = SENTENCES | {"train": SENTENCES["train"][:1], "test": SENTENCES["test"][::-1]}
    with pytest.raises(UserError) as error:
        run(expected=expected)
    for split in ("train", "test"):
        there, other = (f"{digest(some)} with {len(some)}" for some in (SENTENCES[split], expected[split]))
        assert f"{split}: SHA-256 {there} sentences, expected {other}" in str(error.value)
    assert "validation:" not in str(error.value)
    assert "--vars.allow_other_data true" in str(error.value)
    assert not (tmp_path / "assets").exists()


def test_other_data_is_taken_with_a_warning_where_allowed(run, capsys):
    assets = run(expected=SENTENCES | {"train": SENTENCES["train"][:1]}, allow_other_data=True)
    assert read_tsv(assets / "data" / "train.tsv") == SENTENCES["train"]
    assert "other content" in one_line(capsys.readouterr().out)


def test_config_without_sums_is_taken_with_a_warning(run, capsys):
    assert (run(dataset_config="PAN-X.xx") / "data" / "train.tsv").is_file()
    assert "no sums for PAN-X.xx" in one_line(capsys.readouterr().out)


@pytest.mark.parametrize("content", ["", "[]", '{"PAN-X.it": {"train": {}}}', '{"PAN-X.it": 1}'])
def test_broken_checksums_file_is_one_sentence(run, tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"broken\.json: expected JSON"):
        run(checksums=path)


def test_real_panx_has_the_recorded_sums_as_tsv_and_as_parquet(panx_dir, tmp_path):
    sentences = {split: read_tsv(panx_dir / f"{split}-it.tsv") for split in SPLITS}
    recorded_sums = json.loads((ROOT / "configs" / "checksums.json").read_text())["PAN-X.it"]
    assert entry(sentences) == recorded_sums
    data = module.read_data(str(hub_layout(tmp_path / "hub", sentences)), "PAN-X.it", COMMIT, "it")
    assert entry(data.splits) == recorded_sums


# the encoder


def test_only_what_is_needed_of_an_encoder_is_copied(run, tmp_path):
    folder = write_encoder(tmp_path / "mine")
    for name in ("pytorch_model.bin", "modeling_mine.py", "optimizer.pt", "README.md"):
        (folder / name).write_text("x")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_text("x")
    assets = run(encoder=str(folder))
    assert sorted(snapshot(assets / "encoder")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_writing_to_a_local_encoder_later_does_not_change_the_assets(run, tmp_path):
    folder = write_encoder(tmp_path / "mine")
    assets = run(encoder=str(folder))
    before = snapshot(assets)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 8)
    assert snapshot(assets) == before


XLM_R = {"tokenizer_class": "XLMRobertaTokenizer"}


@pytest.mark.parametrize(
    ("configs", "change", "sentence"),
    [
        ({}, lambda folder: (folder / "config.json").unlink(), "no config.json"),
        ({}, lambda folder: (folder / "config.json").write_text("{"), "config.json is not a JSON object"),
        ({}, lambda folder: (folder / "config.json").write_text('{"a": 1}'), "config.json has no model_type"),
        ({}, lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer; expected tokenizer.json"),
        ({}, lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.txt"), "PreTrainedTokenizerFast needs"),
        (
            {},
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "no model.safetensors",
        ),
        ({}, lambda folder: os.truncate(folder / "model.safetensors", 80), "not a whole safetensors file"),
        ({"tokenizer": {"vocab_file": "/etc/passwd"}}, lambda folder: None, "names a file of its own (vocab_file)"),
        ({"tokenizer": XLM_R}, lambda folder: None, "no sentencepiece.bpe.model, which spacy-transformers opens"),
        (
            {"tokenizer": {"tokenizer_class": None}, "config": {"model_type": "xlm-roberta"}},
            lambda folder: None,
            "no sentencepiece.bpe.model, which spacy-transformers opens for every XLMRobertaTokenizer",
        ),
        (
            {"tokenizer": {"tokenizer_class": "XLMRobertaTokenizerFast"}},
            lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.txt"),
            "no sentencepiece.bpe.model, which a XLMRobertaTokenizer is read from",
        ),
    ],
)
def test_encoder_that_could_not_be_loaded_is_refused_in_one_sentence(run, tmp_path, configs, change, sentence):
    folder = write_encoder(tmp_path / "mine", **configs)
    change(folder)
    with pytest.raises(UserError) as error:
        run(encoder=str(folder))
    assert str(error.value).startswith(f"Encoder {folder}: ")
    assert sentence in str(error.value)
    assert not (tmp_path / "assets").exists()


def test_all_problems_of_an_encoder_are_told_at_once(tmp_path):
    problems = encoder_problems(tmp_path, "mine")
    assert [problem.split(";")[0] for problem in problems] == [
        "Encoder mine: no config.json",
        "Encoder mine: no model.safetensors",
        "Encoder mine: no tokenizer",
    ]


def test_xlm_roberta_with_its_sentencepiece_file_is_fine(tmp_path):
    folder = write_encoder(tmp_path / "mine", tokenizer=XLM_R, config={"model_type": "xlm-roberta"})
    (folder / "sentencepiece.bpe.model").write_text("x")
    assert encoder_problems(folder, "mine") == []


def test_each_shard_of_the_weights_must_be_there(tmp_path):
    folder = write_encoder(tmp_path / "mine")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / "model.safetensors").rename(folder / shards[0])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    assert [shards[1] in problem for problem in encoder_problems(folder, "mine")] == [True]
    (folder / shards[1]).write_bytes((folder / shards[0]).read_bytes())
    assert encoder_problems(folder, "mine") == []


# whole or not at all


def test_provenance_tells_all_and_does_not_depend_on_place_or_time(run, tmp_path):
    first = (run() / "provenance.json").read_bytes()
    for folder in ("tsv", "tiny"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / folder).rename(tmp_path / "elsewhere" / folder)
    elsewhere = tmp_path / "elsewhere"
    second = run(dataset=str(elsewhere / "tsv"), encoder=str(elsewhere / "tiny"), output=tmp_path / "assets")
    assert (second / "provenance.json").read_bytes() == first
    provenance = json.loads(first)
    assert provenance["data"] | {"files": None} == {
        "kind": "tsv",
        "source": "tsv",
        "config": "PAN-X.it",
        "revision": None,
        "commit": None,
        "tags": list(TAGS),
        "files": None,
    }
    content = to_tsv(SENTENCES["train"])
    assert provenance["data"]["files"]["train.tsv"] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "sentences": 2,
        "tokens": 8,
    }
    assert provenance["encoder"]["kind"] == "folder"
    for name, content in snapshot(second / "encoder").items():
        expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert provenance["encoder"]["files"][name] == expected


def test_failed_run_leaves_earlier_assets_as_they_were(run, tmp_path):
    before = snapshot(run())
    empty = tmp_path / "empty"
    empty.mkdir()
    for options in ({"dataset": str(empty)}, {"encoder": str(empty)}, {"expected": dict.fromkeys(SPLITS, ())}):
        with pytest.raises(UserError):
            run(**options)
    assert snapshot(tmp_path / "assets") == before


def test_interrupt_while_copying_leaves_nothing_new(run, tmp_path, monkeypatch):
    before = snapshot(run())

    def interrupted(source, target, **options):
        copy_encoder(source, target, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "copy_encoder", interrupted)
    other = write_tsv(tmp_path / "other", SENTENCES | {"train": SENTENCES["train"][:1]})
    with pytest.raises(KeyboardInterrupt):
        run(dataset=str(other), allow_other_data=True)
    assert snapshot(tmp_path / "assets") == before


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(run, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    host = socket.gethostname()
    left = tmp_path / "assets" / f".encoder.partial-{host}-{killed.pid}"
    living = tmp_path / "assets" / f".encoder.partial-{host}-{os.getppid()}"
    elsewhere = tmp_path / "assets" / f".encoder.partial-another{host}-{killed.pid}"
    for folder in (left, living, elsewhere):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    run()
    assert not left.exists()
    assert living.exists()
    assert elsewhere.exists()


def test_the_reason_of_an_error_that_is_not_the_file_systems_is_kept(tmp_path):
    with pytest.raises(OSError, match="^Data corruption detected$"), replacing(tmp_path / "file"):
        raise OSError("Data corruption detected")


@pytest.mark.parametrize("part", ["data/train.tsv", "encoder/model.safetensors"])
def test_record_holds_only_for_the_same_request_and_untouched_files(run, part):
    assets = run()
    name = part.split("/")[0]
    source = {"data": "tsv", "encoder": "tiny"}[name]
    assert recorded(assets, name, {"source": source})
    assert not recorded(assets, name, {"source": "another"})
    content = (assets / part).read_bytes()
    (assets / part).write_bytes(content[:-1] + b"?")
    assert not recorded(assets, name, {"source": source})
    (assets / part).write_bytes(content)
    (assets / name / "added_tokens.json").write_text("{}")
    assert not recorded(assets, name, {"source": source})
    (assets / name / "added_tokens.json").unlink()
    assert recorded(assets, name, {"source": source})
    (assets / part).unlink()
    assert not recorded(assets, name, {"source": source})
    (assets / "provenance.json").write_text('{"data": []')
    assert not recorded(assets, name, {"source": source})


# the Hub, as far as `datasets` and `huggingface_hub` ask it


class Hub(ThreadingHTTPServer):
    """Serves `repos`: by "datasets/owner/name" or "models/owner/name" the files of its only commit."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.sends: dict[str, bytes] = {}  # files sent with other content than announced, which is this
        self.breaks_at: dict[str, int] = {}  # files in whose middle, after so many bytes, the connection breaks off
        self.refused: dict[str, int] = {}  # files answered with that status
        self.sent: list[str] = []
        self.ranges: list[str] = []
        self.status = 200

    def add(self, repo: str, folder: Path):
        self.repos[repo] = snapshot(folder)


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub = self.server
        path = urllib.parse.unquote(self.path.partition("?")[0]).strip("/")
        if hub.status != 200:
            return self.reply(hub.status)
        if match := re.fullmatch(
            r"api/((?:datasets|models)/\w+/\w+)(?:/(revision|tree|paths-info)/(\w+)/?(.*))?", path
        ):
            repo, call, revision, below = match.groups()
            files = hub.repos.get(repo)
            if files is None:
                return self.reply(404, X_Error_Code="RepoNotFound")
            if revision not in (None, "main", COMMIT):
                return self.reply(404, X_Error_Code="RevisionNotFound")
            if call in ("tree", "paths-info"):
                folders = {str(folder) for name in files for folder in Path(name).parents} - {"."}
                if call == "paths-info":
                    wanted = [name for name in self.posted["paths"] if name in files or name in folders]
                else:
                    wanted = [name for name in (*files, *folders) if name.startswith(f"{below}/" if below else "")]
                    if "recursive=true" not in self.path.lower():
                        wanted = [name for name in wanted if name.removeprefix(f"{below}/").count("/") == 0]
                found = [
                    {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
                    if name in files
                    else {"type": "directory", "path": name, "oid": "0" * 40}
                    for name in wanted
                ]
                return self.reply(200, json.dumps(found).encode())
            info = {"id": repo.partition("/")[2], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.reply(200, json.dumps(info).encode())
        if match := re.fullmatch(r"(datasets/)?(\w+/\w+)/resolve/\w+/(.+)", path):
            repo = f"{match[1] or 'models/'}{match[2]}"
            content = hub.repos.get(repo, {}).get(match[3])
            if content is None:
                return self.reply(404, X_Error_Code="EntryNotFound")
            etag = hashlib.sha256(content).hexdigest()
            if self.command == "GET":
                return self.send_file(match[3], f"{repo}/{match[3]}", content, etag)
            return self.reply(200, content, ETag=f'"{etag}"')
        return self.reply(404)

    def send_file(self, name, path, content, etag):
        hub = self.server
        name = Path(name).name
        if name in hub.refused:
            return self.reply(hub.refused[name])
        hub.sent.append(path)
        content = hub.sends.get(name, content)
        start = 0
        if wanted := self.headers.get("Range"):
            hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        if name in hub.breaks_at:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: hub.breaks_at[name]])
            self.close_connection = True
            return None
        more = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        return self.reply(206 if start else 200, content[start:], ETag=f'"{etag}"', **more)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.posted = urllib.parse.parse_qs(body)
        self.do_GET()


@pytest.fixture
def hub(tmp_path):
    server = Hub()
    server.add("datasets/acme/names", hub_layout(tmp_path / "hub-data"))
    folder = write_encoder(tmp_path / "hub-encoder")
    (folder / "pytorch_model.bin").write_text("x")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "spiece.model").write_text("x")
    server.add("models/acme/tiny", folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    with contextlib.suppress(OSError):
        server.shutdown()
        server.server_close()
    thread.join()


@pytest.fixture
def script(tmp_path):
    """Runs download.py as the project does, against that endpoint; gives the exit code, the text and the assets."""

    def call(endpoint, *options, **environment):
        checksums = tmp_path / "sums.json"
        checksums.write_text(json.dumps({"PAN-X.it": entry(SENTENCES)}))
        arguments = {
            "dataset": "acme/names",
            "dataset-config": "PAN-X.it",
            "dataset-revision": COMMIT,
            "encoder": "acme/tiny",
            "encoder-revision": COMMIT,
            "lang": "it",
            "output": tmp_path / "assets",
            "checksums": checksums,
        }
        arguments |= dict(zip(options[::2], options[1::2], strict=True))
        command = [sys.executable, "-m", "scripts.download", "false"]
        for name, value in arguments.items():
            command += [f"--{name}", value]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            # the loopback interface is reached directly whatever proxy the machine has
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            **environment,
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stdout + done.stderr
        return done.returncode, one_line(done.stdout), tmp_path / "assets"

    return call


def address(server: Hub) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_hub_snapshot_is_fetched_once_verified_and_mended(hub, script):
    code, text, assets = script(address(hub))
    assert code == 0, text
    assert read_tsv(assets / "data" / "train.tsv") == SENTENCES["train"]
    provenance = json.loads((assets / "provenance.json").read_text())
    for part, source in (("data", "acme/names"), ("encoder", "acme/tiny")):
        record = provenance[part]
        assert (record["kind"], record["source"], record["revision"]) == ("hub", source, COMMIT)
        assert record["commit"] == COMMIT
    assert not [name for name in hub.sent if name.endswith((".bin", "onnx/spiece.model"))]
    assert "pytorch_model.bin" not in snapshot(assets / "encoder")
    before = snapshot(assets)
    hub.shutdown()
    hub.server_close()

    # what is there needs no Hub any more
    code, text, _ = script(address(hub))
    assert code == 0
    assert text.count("already there, verified") == 2
    assert snapshot(assets) == before

    # changed assets come from the cache, again without the Hub; the weights there are not the ones linked here
    (assets / "data" / "test.tsv").write_text("other")
    (assets / "encoder" / "tokenizer.json").unlink()
    code, text, _ = script(address(hub), HF_HUB_OFFLINE="1")
    assert code == 0, text
    assert snapshot(assets) == before

    # but the cache's copy is not taken for another commit
    code, text, _ = script(address(hub), "dataset-revision", "f" * 40)
    assert code == 1
    assert "dataset acme/names could not be fetched" in text
    assert snapshot(assets) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("dataset-revision", "b" * 40), f"dataset acme/names has no revision {'b' * 40}; set --vars.dataset_revision"),
        (("dataset", "acme/nothing"), "The Hub has no dataset acme/nothing that may be read"),
        (("dataset", "acme names"), "'acme names' is neither a folder nor an id on the Hub"),
    ],
)
def test_unknown_repository_or_revision_is_one_sentence(hub, script, options, sentence):
    code, text, assets = script(address(hub), *options)
    assert (code, sentence in text) == (1, True), text
    assert not assets.exists()


def test_encoder_with_pickled_weights_only_is_refused(hub, script, tmp_path):
    del hub.repos["models/acme/tiny"]["model.safetensors"]
    code, text, assets = script(address(hub), "dataset", str(write_tsv(tmp_path / "mine")))
    assert code == 1
    assert "Encoder acme/tiny: no model.safetensors; pickled weights (pytorch_model.bin) are not read" in text
    assert not assets.exists()


def test_encoder_cut_off_in_the_cache_is_not_taken_for_whole(hub, script, tmp_path):
    dataset = str(write_tsv(tmp_path / "mine"))
    assert script(address(hub), "dataset", dataset)[0] == 0
    next((tmp_path / "hf").rglob("snapshots/*/tokenizer.json")).unlink()
    before = snapshot(tmp_path / "assets")
    (tmp_path / "assets" / "provenance.json").unlink()
    code, text, assets = script(address(hub), "dataset", dataset, HF_HUB_OFFLINE="1")
    assert code == 1
    assert "encoder acme/tiny could not be fetched from the Hub" in text
    code, text, _ = script(address(hub), "dataset", dataset)
    assert code == 0, text
    assert snapshot(assets) == before


@pytest.mark.parametrize("status", [429, 503])
def test_hub_that_refuses_is_one_sentence_with_its_status(hub, script, tmp_path, status):
    hub.status = status
    code, text, assets = script(address(hub), "dataset", str(write_tsv(tmp_path / "mine")))
    assert code == 1
    assert text.count("✘") == 1
    assert f"(HTTP {status})" in text
    assert not assets.exists()


def test_data_is_not_asked_for_again_and_again(hub, script):
    hub.status = 503  # the libraries would try for half a minute
    began = time.monotonic()
    code, text, assets = script(address(hub))
    assert time.monotonic() - began < 20
    assert (code, text.count("✘"), "(HTTP 503)" in text) == (1, 1, True), text
    assert not assets.exists()


@pytest.mark.parametrize(
    ("environment", "reason"), [({}, "ConnectionError"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")]
)
@pytest.mark.parametrize("kind", ["dataset", "encoder"])
def test_without_a_hub_one_sentence_says_what_to_set(script, tmp_path, kind, environment, reason):
    closed = "http://127.0.0.1:9"
    options = () if kind == "dataset" else ("dataset", str(write_tsv(tmp_path / "mine")))
    code, text, assets = script(closed, *options, **environment)
    assert code == 1
    name = {"dataset": "acme/names", "encoder": "acme/tiny"}[kind]
    assert f"{kind} {name} could not be fetched from the Hub at {closed} ({reason})" in text
    assert f"set --vars.{kind} FOLDER" in text
    assert "`make demo`" in text
    assert text.count("✘") == 1
    assert not assets.exists()


WEIGHTS, ROWS = "model.safetensors", "train-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("name", "fault", "sentence"),
    [
        (WEIGHTS, "breaks off", "encoder acme/tiny could not be fetched from the Hub at"),
        (ROWS, "breaks off", "dataset acme/names could not be fetched from the Hub at"),
        pytest.param(WEIGHTS, "is cut short", "encoder acme/tiny could not be fetched from the Hub at", marks=SLOW),
        (ROWS, "is cut short", "(a file came without its end); try again"),
        (WEIGHTS, "is altered", "Encoder file model.safetensors: its hash is"),
        pytest.param(ROWS, "is altered", f"Dataset file PAN-X.it/{ROWS}: its hash is", marks=SLOW),
        (ROWS, "is altered and can be read", f"Dataset file PAN-X.it/{ROWS}: its hash is"),
        pytest.param(ROWS, "is refused", "(HTTP 429); try again", marks=SLOW),
        pytest.param(WEIGHTS, "fails", "(HTTP 500; what came is kept)", marks=SLOW),
        pytest.param(ROWS, "fails", "(HTTP 500); try again", marks=SLOW),
    ],
)
def test_a_file_that_does_not_come_whole(hub, script, tmp_path, name, fault, sentence):
    """One sentence says so, nothing of it is kept, and the next run goes on."""
    path = f"PAN-X.it/{name}" if name == ROWS else name
    content = hub.repos["datasets/acme/names" if name == ROWS else "models/acme/tiny"][path]
    if fault == "breaks off":
        hub.breaks_at[name] = 30
    elif fault == "is cut short":
        hub.sends[name] = content[:-20]
    elif fault == "is altered":
        hub.sends[name] = content[:-1] + b"?"
    elif fault == "is altered and can be read":
        hub.sends[name] = content.replace(b"Calzolai", b"Calzolaj")
        assert hub.sends[name] != content
    else:
        hub.refused[name] = 429 if fault == "is refused" else 500
    options = () if name == ROWS else ("dataset", str(write_tsv(tmp_path / "mine")))
    code, text, assets = script(address(hub), *options)
    assert (code, text.count("✘"), sentence in text) == (1, 1, True), text
    assert not assets.exists() or snapshot(assets) == {}
    for faults in (hub.breaks_at, hub.sends, hub.refused):
        faults.clear()
    code, text, _ = script(address(hub), *options)
    assert code == 0, text
    assert read_tsv(assets / "data" / "train.tsv") == SENTENCES["train"]
    assert snapshot(assets / "encoder")[WEIGHTS] == hub.repos["models/acme/tiny"][WEIGHTS]


def test_weights_whose_connection_broke_off_are_not_fetched_from_the_beginning(hub, script, tmp_path):
    name = "model.safetensors"
    save_file({"w": numpy.arange(3_000_000, dtype="float32")}, tmp_path / "hub-encoder" / name)
    hub.add("models/acme/tiny", tmp_path / "hub-encoder")
    dataset = str(write_tsv(tmp_path / "tsv"))
    hub.breaks_at[name] = 11_000_000  # the library keeps whole blocks of 10 MiB
    code, text, _ = script(address(hub), "dataset", dataset)
    assert (code, text.count("✘"), "what came is kept" in text) == (1, 1, True), text
    hub.breaks_at.clear()
    code, text, assets = script(address(hub), "dataset", dataset)
    assert code == 0, text
    assert hub.ranges == [f"bytes={10 << 20}-"]
    assert snapshot(assets / "encoder")[name] == hub.repos["models/acme/tiny"][name]
