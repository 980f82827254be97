import csv
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.language import Language

from scripts.annotate import __main__ as annotate_script
from scripts.annotate.units import cut, read
from scripts.annotate.worker import annotate_unit

SCRIPT = Path(annotate_script.__file__)
slow = pytest.mark.skipif("FAULTS" not in os.environ, reason="make test-faults runs it: minutes")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not here: requirements-annotate.txt has it")
PLACES = ("Bari", "Gela", "Nuoro")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline that finds three places; slow enough that a run can be killed in its middle."""
    nlp = spacy.blank("it")
    slow = [{"label": "NO", "pattern": [{"TEXT": {"REGEX": f"^{n}{n}x"}}]} for n in range(300)]
    nlp.add_pipe("entity_ruler").add_patterns([*({"label": "LOC", "pattern": place} for place in PLACES), *slow])
    folder = tmp_path_factory.mktemp("model") / "places"
    nlp.to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a Ray cluster that was started elsewhere and without this project's scripts, with its token."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2"]
    command += ["--include-dashboard=false", "--object-store-memory=80000000", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("elsewhere") / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=log.parent, env=environment | token, stdout=file, stderr=file)
    while not (found := re.search(r"--address='([^']+)'", log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    yield found[1], token
    process.terminate()
    process.wait()


def texts(count, start=0):
    return [f"La riga {n} va da {PLACES[n % 3]} a Roma, città numero {n}." for n in range(start, start + count)]


def write_folder(folder, count):
    """A folder with `count` rows in each of the three formats; the texts by file name."""
    (folder / "sub").mkdir(parents=True)
    parquet, lines, quoted = texts(count), texts(count, count), texts(count, 2 * count)
    quoted = [f'"{text}"\nseconda riga, a Gela' for text in quoted]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(count), "text": parquet}), folder / "a.parquet")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines), encoding="utf8")
    with (folder / "sub" / "c.csv").open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(quoted)])
    return {"a.parquet": parquet, "b.jsonl": lines, "sub/c.csv": quoted}


def rows_of(output):
    """{(file, row): (text, entities)} of an output folder, each row once."""
    table = [row for path in sorted(output.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]
    rows = {(row["file"], row["row"]): (row["text"], row["entities"]) for row in table}
    assert len(rows) == len(table)
    return rows


def bad_of(output):
    lines = [line for path in sorted((output / "_bad").glob("*")) for line in path.read_text().splitlines()]
    return {(row["file"], row["row"]): row["reason"] for row in map(json.loads, lines)}


def expected_of(model, by_file):
    """What `nlp.pipe` says of the rows, in the form of `rows_of`."""
    nlp, expected = spacy.load(model), {}
    for name, file_texts in by_file.items():
        for row, doc in enumerate(nlp.pipe(file_texts)):
            found = [{"start": e.start_char, "end": e.end_char, "label": e.label_, "score": None} for e in doc.ents]
            expected[name, row] = (doc.text, found)
    return expected


def start(*arguments, environment=None, cwd=None):
    command = [str(argument) for argument in (sys.executable, SCRIPT, *arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, env=os.environ | (environment or {}), cwd=cwd, **pipes)


def wait_for(process, folder, pattern, count):
    """The files that the running command has made, once there are `count`."""
    while len(found := list(folder.glob(pattern))) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    return found


def annotate_file(model, path, output, rows=1000, max_chars=1000):
    """The rows and bad rows of one file, annotated in this process."""
    nlp = spacy.load(model) if isinstance(model, Path) else model
    for unit in cut(path, "text", rows):
        annotate_unit(nlp, path, path.name, "text", max_chars, unit, output)
    return rows_of(output), bad_of(output)


@needs_ray
def test_a_cluster_without_the_scripts_says_what_nlp_pipe_says_for_each_format(model, cluster, tmp_path):
    by_file = write_folder(tmp_path / "in", 50)
    address, token = cluster
    arguments = (model, "in", "out", "--workers", 2, "--address", address, "--unit-rows", 20)
    run = start(*arguments, environment=token, cwd=tmp_path)  # relative names are the command's, not the cluster's
    printed = run.communicate()[0]
    assert run.returncode == 0, printed
    assert re.search(r"150 rows; [\d,.]+ rows/s with 2 worker", printed)
    assert rows_of(tmp_path / "out") == expected_of(model, by_file)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".parquet"} == {
        "_manifest.json",
        "_lock",
    }


@slow
@needs_ray
def test_a_killed_worker_loses_nothing_and_repeats_nothing(model, cluster, tmp_path):
    by_file = write_folder(tmp_path / "in", 300)
    address, token = cluster
    arguments = (model, tmp_path / "in", tmp_path / "out", "--workers", 2, "--address", address, "--unit-rows", 150)
    run = start(*arguments, environment=token)
    (half_written, *_) = wait_for(run, tmp_path / "out", ".part-*.partial-*", 1)
    os.kill(int(half_written.name.rpartition("-")[2]), signal.SIGKILL)
    printed = run.communicate()[0]
    assert run.returncode == 0, printed
    assert rows_of(tmp_path / "out") == expected_of(model, by_file)
    assert list((tmp_path / "out").glob(".*")) == []


@slow
@needs_ray
def test_a_killed_run_goes_on_where_it_stopped(model, tmp_path):
    by_file = write_folder(tmp_path / "in", 300)
    out = tmp_path / "out"
    arguments = (model, tmp_path / "in", out, "--workers", 1, "--unit-rows", 30)
    run = start(*arguments)
    wait_for(run, out, "part-*", 3)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    written = {path: path.stat() for path in out.glob("part-*")}
    assert 3 <= len(written) < 30
    again = start(*arguments)
    printed = again.communicate()[0]
    assert again.returncode == 0, printed
    assert rows_of(out) == expected_of(model, by_file)
    assert all(path.stat().st_mtime_ns == status.st_mtime_ns for path, status in written.items())
    assert list(out.glob(".*")) == []
    assert not (out / "_tried").exists()


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_each_row_is_in_one_unit_and_each_unit_reads_alone(tmp_path, suffix, rows):
    wanted = ["a", '"', 'b\n"c"\n', "", "è, \r\n", "\u2028x", "d"]
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": wanted}), path, row_group_size=3)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in wanted), encoding="utf8")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([("text", "n"), *((text, 1) for text in wanted)])
            file.write("\r\n")
    units = list(cut(path, "text", rows))
    assert [unit.first for unit in units] == list(range(0, 7, rows))
    for unit in reversed(units):
        assert list(read(path, "text", unit)) == [(text, "") for text in wanted[unit.first : unit.first + rows]]


# the csv module's own writer and reader decide what is right; a lone carriage return outside quotes is refused
@given(
    st.lists(st.lists(st.text(st.sampled_from('a",\n\r è\u2028\0'), max_size=8), min_size=2, max_size=3), max_size=12),
    st.integers(1, 5),
)
@settings(deadline=None, max_examples=60)
def test_csv_is_cut_as_the_csv_module_reads_it(tmp_path_factory, table, rows):
    path = tmp_path_factory.mktemp("csv") / "in.csv"
    with path.open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([("id", "text"), *table])
    units = list(cut(path, "text", rows))
    assert [value for unit in units for value, _ in read(path, "text", unit)] == [fields[1] for fields in table]


def test_bad_rows_of_jsonl_are_named_with_the_reason(model, tmp_path):
    lines = [
        b'{"text": "Bari"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "' + b"x" * 1001 + b'"}',
        b"{text}",
        b"",
        b"[1]",
        b'{"testo": "Bari"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "Gela"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    rows, bad = annotate_file(model, tmp_path / "in.jsonl", tmp_path / "out", rows=5)
    assert {row: text for (_, row), (text, _) in rows.items()} == {0: "Bari", 11: "Gela"}
    reasons = ["null", "not a string: int", "too long: 1,001", "not JSON", "an empty line", "not a JSON object"]
    reasons += ["no 'text'", "not UTF-8", "not valid Unicode", "not JSON"]
    for row, reason in enumerate(reasons, 1):
        assert bad["in.jsonl", row].startswith(reason)
    assert len(bad) == len(reasons)


def test_bad_rows_of_csv_and_parquet_are_named_with_the_reason(model, tmp_path):
    (tmp_path / "in.csv").write_bytes(b"id,text\n1\n2,Bari\n3,\xff\n4," + b"x" * 1001 + b"\n")
    rows, bad = annotate_file(model, tmp_path / "in.csv", tmp_path / "csv")
    assert [text for text, _ in rows.values()] == ["Bari"]
    assert list(bad) == [("in.csv", 0), ("in.csv", 2), ("in.csv", 3)]
    assert "1 fields" in bad["in.csv", 0]
    column = pyarrow.array([b"Bari", None, b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    rows, bad = annotate_file(model, tmp_path / "in.parquet", tmp_path / "parquet")
    assert [text for text, _ in rows.values()] == ["Bari"]
    assert list(bad.values()) == ["null", "not UTF-8"]


def test_a_text_on_which_the_pipeline_fails_is_a_bad_row(tmp_path):
    @Language.component("fails_on_bari")
    def fails(doc):
        if doc.text == "Bari":
            raise ValueError("no Bari")
        return doc

    nlp = spacy.blank("it")
    nlp.add_pipe("fails_on_bari")
    (tmp_path / "in.jsonl").write_text('{"text": "Gela"}\n{"text": "Bari"}\n{"text": "Nuoro"}\n')
    rows, bad = annotate_file(nlp, tmp_path / "in.jsonl", tmp_path / "out")
    assert [text for text, _ in rows.values()] == ["Gela", "Nuoro"]
    assert bad == {("in.jsonl", 1): "the pipeline fails: ValueError: no Bari"}


def test_a_pipeline_that_fails_on_every_text_writes_nothing(tmp_path):
    @Language.component("fails_always")
    def fails(doc):
        raise ValueError("broken")

    nlp = spacy.blank("it")
    nlp.add_pipe("fails_always")
    (tmp_path / "in.jsonl").write_text('{"text": "Gela"}\n')
    with pytest.raises(ValueError, match="broken"):
        annotate_file(nlp, tmp_path / "in.jsonl", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_scores_are_those_of_the_pipeline(tiny_encoder, tmp_path):
    nlp = spacy.blank("it")
    config = {"@architectures": "panx_xlmr.TransformerModel.v1", "name": str(tiny_encoder), "mixed_precision": False}
    nlp.add_pipe("transformer", config={"model": config | {"tokenizer_config": {}, "transformer_config": {}}})
    ner = nlp.add_pipe("token_ner")
    for label in ("LOC", "PER"):
        ner.add_label(label)
    nlp.initialize()
    lines = texts(20)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    rows, _ = annotate_file(nlp, tmp_path / "in.jsonl", tmp_path / "out", rows=6)
    found = [(e["start"], e["end"], e["label"], e["score"]) for _, ents in rows.values() for e in ents]
    docs = list(nlp.pipe(lines))
    expected = [(e.start_char, e.end_char, e.label_, e._.panx_score) for doc in docs for e in doc.ents]
    assert expected
    assert [entity[:3] for entity in found] == [entity[:3] for entity in expected]
    assert [entity[3] for entity in found] == pytest.approx([entity[3] for entity in expected], abs=1e-4)


@pytest.fixture
def begun(model, tmp_path):
    """A run that has annotated nothing yet: (model, input folder, output folder)."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_folder(source, 5)
    chosen = {"model": annotate_script.identify(str(model)), "column": "text", "max_chars": 100_000}
    with annotate_script.only_one(out):
        annotate_script.plan(source, out, chosen | {"unit_rows": 10_000})
    return model, source, out


def test_another_model_is_refused(begun, refused, tmp_path):
    model, source, out = begun
    spacy.blank("it").to_disk(tmp_path / "other")
    assert "was begun with model it_pipeline" in refused(annotate_script, tmp_path / "other", source, out)


def test_other_settings_are_refused(begun, refused):
    assert "begun with max_chars 100000, not 5" in refused(annotate_script, *begun, "--max-chars", 5)


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_other_input_is_refused(begun, refused, change):
    _, source, _ = begun
    path = source / ("b.jsonl" if change != "added" else "d.jsonl")
    path.unlink() if change == "removed" else path.write_text('{"text": "Nuoro"}\n')
    assert f"begun with another {path.name}" in refused(annotate_script, *begun)


def test_a_second_run_at_the_same_time_is_refused(begun, refused):
    with annotate_script.only_one(begun[2]):
        assert "another run writes there" in refused(annotate_script, *begun)


def test_a_folder_with_other_files_is_refused(model, refused, tmp_path):
    write_folder(tmp_path / "in", 5)
    assert "not begun by this command" in refused(annotate_script, model, tmp_path / "in", tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.parquet", b"PAR1 no", "a.parquet: not a whole Parquet file"),
        ("a.parquet", b"", "a.parquet: not a whole Parquet file"),
        ("a.csv", b"id,testo\n1,Bari\n", "a.csv: no column 'text'; its columns are 'id', 'testo'"),
        ("a.csv", b"", "a.csv: no column 'text'; its columns are none"),
        ("a.csv", b"text\nuno\rdue\n", "a.csv: the record at byte 5 is no CSV"),
        ("a.jsonl", b'{"testo": "Bari"}\n', "a.jsonl: no column 'text'; its columns are 'testo'"),
        ("a.txt", b"Bari\n", "no .parquet, .csv, .jsonl file to annotate"),
    ],
)
def test_a_file_that_can_not_be_annotated_is_one_sentence_and_nothing_is_written(
    model, refused, tmp_path, name, content, expected
):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    assert expected in refused(annotate_script, model, tmp_path / "in", tmp_path / "out")
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_a_file_whose_name_is_not_utf8_is_refused(model, refused, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"citt\xe0.jsonl")).write_text('{"text": "Bari"}\n')
    assert "the file's name is not UTF-8" in refused(annotate_script, model, tmp_path / "in", tmp_path / "out")


def test_a_run_that_was_killed_while_it_wrote_its_plan_can_be_started_again(model, tmp_path):
    write_folder(tmp_path / "in", 5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "._manifest.json.partial-host-1").write_text("{")
    chosen = {"column": "text", "unit_rows": 10, "max_chars": 10, "model": "any"}
    assert annotate_script.plan(tmp_path / "in", tmp_path / "out", chosen)


def test_a_folder_of_this_project_is_refused_since_other_machines_lack_its_code(project, refused, tmp_path):
    write_folder(tmp_path / "in", 5)
    output = refused(annotate_script, project / "training" / "model", tmp_path / "in", tmp_path / "out")
    assert "install the wheel" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("machines", "cpus", "gpus", "workers"),
    [
        ([{"CPU": 16.0, "GPU": 1.0}], 1, 1, 1),
        ([{"CPU": 16.0, "GPU": 1.0}], 64, 1, 0),
        ([{"CPU": 16.0, "GPU": 1.0}], 1, 0.5, 2),
        ([{"CPU": 2.0}, {"CPU": 3.0}], 2, 0, 2),
        ([{"CPU": 2.0}, {"CPU": 2.0}], 4, 0, 0),
        ([{"memory": 1.0}], 1, 0, 0),
    ],
)
def test_workers_fit_where_one_machine_has_the_cpus_and_gpus_of_each(machines, cpus, gpus, workers):
    assert annotate_script.fitting_workers(machines, cpus, gpus) == workers


def test_a_parquet_column_of_numbers_is_refused(model, refused, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    output = refused(annotate_script, model, tmp_path / "a.parquet", tmp_path / "out")
    assert "the column 'text' is int64, not strings" in output


def test_a_model_that_is_not_there_is_refused(refused, tmp_path):
    write_folder(tmp_path / "in", 5)
    output = refused(annotate_script, "it_no_such", tmp_path / "in", tmp_path / "out")
    assert "it_no_such: neither an installed pipeline nor a pipeline's folder" in output


@pytest.fixture
def actor(begun):
    """An Annotator in this process, and the batch it is called with for the first unit."""
    model, source, out = begun
    (out / "_tried").mkdir()
    chosen = json.loads((out / "_manifest.json").read_text())["settings"]
    unit = next(cut(source / "a.parquet", "text", 10_000))
    status = numpy.array([annotate_script.fingerprint(source / "a.parquet")])
    batch = {key: [value] for key, value in unit._asdict().items()} | {"name": ["a.parquet"], "fingerprint": status}
    return annotate_script.Annotator(str(model), source, out, chosen, 1, False), batch, out


def test_a_unit_that_was_written_before_its_worker_died_is_not_done_again(actor):
    annotator, batch, out = actor
    annotator(batch)
    (part,) = out.glob("part-*")
    before = part.stat().st_mtime_ns
    assert annotator(batch)["error"] == [""]
    assert part.stat().st_mtime_ns == before


def test_a_unit_on_which_workers_die_is_given_up(actor):
    annotator, batch, out = actor
    for _ in range(annotate_script.ATTEMPTS):
        assert annotator(batch)["error"] == [""]
        next(out.glob("part-*")).unlink()
    assert annotator(batch)["error"] == ["a.parquet: 4 workers died on its 5 rows from 0 on."]


def test_input_that_changes_during_the_run_is_an_error(actor):
    annotator, batch, out = actor
    (annotator.root / "a.parquet").touch()
    assert "a.parquet: it has changed since the run began" in annotator(batch)["error"][0]
    assert list(out.glob("*part-*")) == []


def test_a_worker_with_another_model_annotates_nothing(actor, tmp_path):
    annotator, batch, out = actor
    spacy.blank("it").to_disk(tmp_path / "other")
    other = annotate_script.Annotator(str(tmp_path / "other"), annotator.root, out, annotator.settings, 1, False)
    assert "other is another there; install the same wheel" in other(batch)["error"][0]
    assert list(out.glob("part-*")) == []
