import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest

from conftest import ROOT, SAMPLE
from fake_hub import COMMIT, Hub, connect, write_encoder
from scripts import download
from scripts.panx import SPLITS, TAGS, Sentence, digest, to_tsv

NAMES = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]  # as on the Hub: another order than panx.TAGS
PIERA = Sentence(("Piera", "Calzolai", "abita", "a", "Nuoro"), ("B-PER", "I-PER", "O", "O", "B-LOC"))
FEW = {split: [PIERA] for split in SPLITS}
SENTENCES = FEW | {"train": [PIERA, Sentence(("``", "d'Otranto", "\u2028"), ("O", "B-LOC", "O"))]}
SPANISH = {"train": [Sentence(("Cádiz",), ("B-LOC",))]}
COUNTS = {split: {"sha256": digest(some), "sentences": len(some)} for split, some in SENTENCES.items()}
STRING, INTEGER, TAG = datasets.Value("string"), datasets.Value("int64"), datasets.ClassLabel(names=NAMES)
MISC = datasets.ClassLabel(names=[*NAMES, "B-MISC"])


def write_tsv(folder, sentences=SENTENCES, name="{split}-it.tsv"):
    folder.mkdir(exist_ok=True)
    for split, some in sentences.items():
        (folder / name.format(split=split)).write_bytes(to_tsv(some))
    return folder


def write_parquet(folder, splits, types, config="PAN-X.it"):
    """Adds a config to a folder in the Hub's layout. splits: the columns `tokens` and `ner_tags` of each."""
    (folder / config).mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        named = {
            name: column for name, column in zip(("tokens", "ner_tags"), columns, strict=True) if column is not None
        }
        features = datasets.Features({name: datasets.List(types[name == "ner_tags"]) for name in named})
        datasets.Dataset.from_dict(named, features=features).to_parquet(folder / config / f"{split}.parquet")
    configs = [path for path in folder.iterdir() if path.is_dir()]
    files = {
        path.name: [{"split": f.stem, "path": f"{path.name}/{f.name}"} for f in path.iterdir()] for path in configs
    }
    card = {"configs": [{"config_name": name, "data_files": some} for name, some in files.items()]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")  # JSON is YAML
    return folder


def hub_layout(folder, sentences=SENTENCES, names=NAMES, config="PAN-X.it"):
    splits = {
        split: ([list(s.words) for s in some], [[names.index(tag) for tag in s.tags] for s in some])
        for split, some in sentences.items()
    }
    return write_parquet(folder, splits, (STRING, datasets.ClassLabel(names=list(names))), config)


def change_json(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def snapshot(folder):
    """Every file below the folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command offline on small local sources, options replaced; returns the files in the assets folder."""
    connect(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path / "hub-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    sources = {"dataset": write_tsv(tmp_path / "tsv"), "encoder": write_encoder(tmp_path / "tiny")}
    pinned = {"dataset_config": "PAN-X.it", "dataset_revision": COMMIT, "encoder_revision": COMMIT, "lang": "it"}
    paths = {"output": tmp_path / "assets", "checksums": tmp_path / "checksums.json"}
    change_json(paths["checksums"], **{"PAN-X.it": COUNTS})

    def call(**replaced):
        options = sources | pinned | paths | replaced
        download.main(**options | {kind: str(options[kind]) for kind in sources})
        return snapshot(tmp_path / "assets")

    yield call
    huggingface_hub.configure_http_backend()


@pytest.fixture
def fails(run, tmp_path, capsys):
    """Runs the command, which must fail and change nothing; returns the one sentence that it prints."""

    def call(**replaced):
        before = snapshot(tmp_path / "assets")
        with pytest.raises(SystemExit, match="1"):
            run(**replaced)
        assert snapshot(tmp_path / "assets") == before
        output = " ".join(capsys.readouterr().out.split())
        assert output.count("✘") == 1
        return output

    return call


@pytest.mark.parametrize("name", ["{split}-it.tsv", "{split}.tsv"])
def test_a_tsv_folder_arrives_byte_for_byte(run, tmp_path, name):
    files = run(dataset=write_tsv(tmp_path / "mine", name=name))
    assert {split: files[f"data/{split}.tsv"] for split in SPLITS} == {s: to_tsv(SENTENCES[s]) for s in SPLITS}


def test_parquet_files_are_read_with_their_tag_names_and_again_when_they_change(run, tmp_path):
    assert run(dataset=hub_layout(tmp_path / "hub"))["data/train.tsv"] == to_tsv(SENTENCES["train"])
    changed = run(dataset=hub_layout(tmp_path / "hub", FEW, names=TAGS), allow_other_data="true")
    assert changed["data/train.tsv"] == to_tsv(FEW["train"])


@pytest.mark.parametrize("name", ["sample", "PAN-X.it"])
def test_published_data_has_the_recorded_checksums(run, request, capsys, name):
    folder = SAMPLE if name == "sample" else request.getfixturevalue("panx_dir")
    run(dataset=folder, dataset_config=name, checksums=ROOT / "configs/checksums.json")
    assert "no checksums" not in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("way", ["folder", "TSV files in the same folder", "config in the Hub's layout"])
def test_training_sentences_of_another_language_are_kept_beside_the_data(run, fails, tmp_path, way):
    dataset, extra, name = write_tsv(tmp_path / "tsv"), "PAN-X.es", "PAN-X.es"
    if way == "folder":
        name = "lo spagnolo"
        extra = f"'{write_tsv(tmp_path / name, SPANISH, '{split}-es.tsv')}'"
    elif way == "TSV files in the same folder":
        write_tsv(dataset, SPANISH, name="{split}-es.tsv")
    else:
        dataset = hub_layout(hub_layout(tmp_path / "hub"), SPANISH, config="PAN-X.es")
    files = run(dataset=dataset, extra_train=extra)
    assert files[f"extra_train/{name}.tsv"] == to_tsv(SPANISH["train"])
    assert files["data/train.tsv"] == to_tsv(SENTENCES["train"])
    (record,) = json.loads(files["provenance.json"])["extra_train"]
    assert (record["config"], record["splits"]["train"]["sentences"]) == (name, 1)
    assert f"{name} is given twice" in fails(dataset=dataset, extra_train=f"{extra} {extra}")
    if way == "TSV files in the same folder":  # its train.tsv is of another language
        write_tsv(dataset, name="{split}.tsv")
        assert "PAN-X.fr is no folder, and" in fails(dataset=dataset, extra_train="PAN-X.fr")
    assert not [path for path in run() if path.startswith("extra_train")]  # without further data, it goes away


@pytest.mark.parametrize("option", ["dataset", "encoder", "extra_train"])
@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~/missing-folder", "a/b/c", "LICENSE"])
def test_a_missing_folder_or_a_file_is_refused(fails, option, name):
    assert f"{name}: no such folder; set a folder with" in fails(**{option: name})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder.mkdir(), "could not be loaded (The directory at"),
        (lambda folder: write_tsv(folder, SPANISH), "neither validation-it.tsv nor validation.tsv"),
        (lambda folder: (write_tsv(folder) / "train-it.tsv").write_text("Nuoro LOC"), "train-it.tsv, line 1: 'Nuoro"),
        (lambda folder: hub_layout(folder, config="PAN-X.es"), "'PAN-X.it' not found. Available: ['PAN-X.es']"),
        (lambda folder: hub_layout(folder, SPANISH), "no split validation, only train"),
        (lambda folder: os.truncate(hub_layout(folder) / "PAN-X.it/train.parquet", 99), "not a parquet file"),
    ],
)
def test_broken_data_is_refused(fails, tmp_path, make, sentence):
    make(tmp_path / "broken")
    assert sentence in fails(dataset=tmp_path / "broken")


@pytest.mark.parametrize(
    ("columns", "types", "sentence"),
    [
        (([["a"]], None), (STRING, TAG), "expected lists, tokens of string and ner_tags of ClassLabel"),
        (([["a"]], [[0]]), (STRING, INTEGER), "ClassLabel, which names the tags"),
        (([[1]], [[0]]), (INTEGER, TAG), "expected lists, tokens of string"),
        (([["a"]], [[0]]), (STRING, MISC), "unknown tag 'B-MISC'; expected"),
        (([], []), (STRING, TAG), "no data"),
        (([["a"], ["b", "c"]], [[0], [0]]), (STRING, TAG), "row 1 (from 0): tokens ['b', 'c'], ner_tags [0]; expected"),
        (([["a"], []], [[0], []]), (STRING, TAG), "row 1 (from 0): tokens []"),
        (([["a\tb"]], [[0]]), (STRING, TAG), "no tab or line end in a token"),
        (([[None]], [[0]]), (STRING, TAG), "row 0 (from 0): tokens [None]"),
        (([["a"]], [[-1]]), (STRING, TAG), "ner_tags [-1]; expected one tag per token, tags from 0 to 6"),
    ],
)
def test_parquet_files_unlike_panx_are_refused(fails, tmp_path, columns, types, sentence):
    assert sentence in fails(dataset=write_parquet(tmp_path / "hub", dict.fromkeys(SPLITS, columns), types))


def test_other_content_is_refused_unless_it_is_allowed(run, fails, tmp_path, capsys):
    few = write_tsv(tmp_path / "few", FEW)
    sentence = fails(dataset=few)
    found, expected = digest(FEW["train"]), COUNTS["train"]["sha256"]
    assert f"train: SHA-256 {found} with 1 sentences, expected {expected} with 2; set another" in sentence
    assert "--vars.allow_other_data true" in sentence
    assert run(dataset=few, allow_other_data="true")["data/train.tsv"] == to_tsv(FEW["train"])
    run(dataset=few, dataset_config="PAN-X.xx")
    output = " ".join(capsys.readouterr().out.split())
    assert "used because allow_other_data is true" in output
    assert "has no checksums for PAN-X.xx" in output


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("config.json", lambda path: path.write_text("{"), "config.json"),
        ("config.json", lambda path: path.write_text("{}"), "model_type"),
        ("tokenizer_config.json", lambda path: path.write_text("[]"), "could not be loaded"),
        ("tokenizer_config.json", lambda path: change_json(path, vocab_file="/etc/passwd"), "remove vocab_file"),
        ("model.safetensors", lambda path: path.rename(path.with_name("pytorch_model.bin")), "weights are not read"),
        ("model.safetensors", lambda path: os.truncate(path, 80), "header"),
    ],
)
def test_an_encoder_that_cannot_be_loaded_is_refused(fails, tmp_path, file, change, sentence):
    change(tmp_path / "tiny" / file)
    assert f"Encoder {tmp_path}/tiny could not be loaded (" in (output := fails())
    assert sentence in output


def test_an_xlm_r_tokenizer_needs_its_sentencepiece_file(run, fails, tmp_path, tiny_encoder):
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "xlmr"))
    assert "encoder/sentencepiece.bpe.model" in run(encoder=folder)
    (folder / "sentencepiece.bpe.model").unlink()
    assert "no sentencepiece.bpe.model, which spacy-transformers opens: add it" in fails(encoder=folder)
    change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    run(encoder=folder)


def test_each_shard_of_the_weights_must_be_there(run, fails, tmp_path):
    shards = [tmp_path / f"tiny/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (tmp_path / "tiny/model.safetensors").rename(shards[0])
    change_json(tmp_path / "tiny/model.safetensors.index.json", weight_map={"a": shards[0].name, "b": shards[1].name})
    assert shards[1].name in fails()
    shutil.copy(*shards)
    assert {f"encoder/{shard.name}" for shard in shards} < set(run())


def test_only_files_that_load_the_encoder_are_copied_and_provenance_has_their_hashes(run, tmp_path):
    for name in ("pytorch_model.bin", "modeling_mine.py", "optimizer.pt", "onnx/model.safetensors"):
        (tmp_path / "tiny" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tiny" / name).write_text("x")
    names = ["config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    files = run()
    assert [path for path in files if path.startswith("encoder/")] == [f"encoder/{name}" for name in names]
    hashes = {name: sha256(files[f"encoder/{name}"]).hexdigest() for name in names}
    assert json.loads(files["provenance.json"]) == {
        "data": {"source": "tsv", "config": "PAN-X.it", "commit": None, "splits": COUNTS},
        "extra_train": [],
        "encoder": {"source": "tiny", "commit": None, "files": hashes},
    }


def test_an_interrupted_run_leaves_earlier_assets_as_they_were(run, tmp_path, monkeypatch):
    before = run()
    monkeypatch.setattr(shutil, "copyfile", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(dataset=write_tsv(tmp_path / "few", FEW), allow_other_data="true")
    assert snapshot(tmp_path / "assets") == before


@pytest.fixture
def hub(run, tmp_path, monkeypatch):
    hub = Hub()
    connect(monkeypatch, hub)
    tiny = snapshot(tmp_path / "tiny") | {"pytorch_model.bin": b"x", "onnx/spiece.model": b"x"}
    hub.publish("datasets", "acme/names", snapshot(hub_layout(tmp_path / "names")))
    hub.publish("models", "acme/tiny", tiny)
    return hub


ON_HUB = {"dataset": "acme/names", "encoder": "acme/tiny"}


def test_a_snapshot_of_the_hub_is_fetched_once_and_whole(hub, run, fails, tmp_path, monkeypatch):
    for hub.cut in ("train.parquet", "model.safetensors"):
        assert "could not be loaded (Consistency check failed" in fails(**ON_HUB)
    hub.cut = "nothing"
    files = run(**ON_HUB)
    assert files["data/train.tsv"] == to_tsv(SENTENCES["train"])
    assert not [path for path in [*hub.sent, *files] if path.endswith((".bin", "spiece.model"))]
    provenance = json.loads(files["provenance.json"])
    assert [provenance[part]["source"] for part in ("data", "encoder")] == ["acme/names", "acme/tiny"]
    assert [provenance[part]["commit"] for part in ("data", "encoder")] == [COMMIT, COMMIT]
    hub.sent.clear()
    assert run(**ON_HUB) == files
    assert not [path for path in hub.sent if "/resolve/" in path]
    connect(monkeypatch)
    assert run(**ON_HUB) == files
    # the cached copy is not used for another commit, even if a download of that one had begun
    assert "HF_HUB_OFFLINE" in fails(**ON_HUB, dataset_revision="f" * 40)
    (tmp_path / "hub-cache/datasets--acme--names/snapshots" / ("f" * 40)).mkdir()
    assert f"the cache has revision {COMMIT}" in fails(**ON_HUB, dataset_revision="f" * 40)


@pytest.mark.parametrize(
    ("replaced", "status", "sentence"),
    [
        ({"dataset": "acme/nothing"}, 200, "Repository Not Found"),
        ({"dataset": "acme names"}, 200, "Repo id must"),
        ({"dataset": "acme/names", "dataset_revision": "b" * 40}, 200, "Revision Not Found"),
        ({"encoder": "acme/nothing"}, 200, "Repository Not Found"),
        *(({kind: ON_HUB[kind]}, code, "check your internet connection") for kind in ON_HUB for code in (0, 429, 503)),
        *(({kind: ON_HUB[kind]}, None, "HF_HUB_OFFLINE") for kind in ON_HUB),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(hub, fails, monkeypatch, replaced, status, sentence):
    hub.status = status
    if status is None:
        connect(monkeypatch)
    output = fails(**replaced)
    assert sentence in output
    assert f"set --vars.{next(iter(replaced))} to a folder with" in output
