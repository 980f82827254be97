import csv
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import spacy

from conftest import ROOT
from lookup_ner import ruler
from scripts.annotate import __main__ as script
from scripts.annotate.units import UNIT_CHARS, Unit, input_files, units
from scripts.annotate.worker import Annotator, identify
from scripts.common import UserError
from test_encoder import pipeline

PLACES = ("Bari", "Gela", "Nuoro")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "places"
    ruler(dict.fromkeys(PLACES, "LOC")).to_disk(folder)
    return folder


def write_folder(folder, count):
    """Write `count` rows in each of the three formats and return what is to be found, in the form of `rows_of`."""
    folder.mkdir()
    texts = [f'Riga {n:03}\nda "{PLACES[n % 3]}" a Roma.' for n in range(count)]
    pyarrow.parquet.write_table(pyarrow.table({"id": range(count), "text": texts}), folder / "a.parquet")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with (folder / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    found = [(text, [(13, 13 + len(PLACES[n % 3]), "LOC", None)]) for n, text in enumerate(texts)]
    return {(name, n): found[n] for name in ("a.parquet", "b.jsonl", "c.csv") for n in range(count)}


def rows_of(output):
    """Return {(file, row): (text, entities)} of an output folder, and check that no row is there twice."""
    table = [row for path in sorted(output.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]
    rows = {(row["file"], row["row"]): (row["text"], [(*e.values(),) for e in row["entities"]]) for row in table}
    assert len(rows) == len(table)
    return rows


def annotate_file(nlp, path, output, max_chars=1000, unit_rows=4):
    """Annotate a file in this process and return its rows and bad rows."""
    annotator = Annotator("", output, {}, 1, False)
    annotator.nlp = nlp
    for unit in units({path.name: path}, "text", max_chars, unit_rows):
        annotator.annotate(unit)
    bad = [json.loads(line) for path in sorted(output.glob("_bad/*")) for line in path.read_text().splitlines()]
    reasons = {(row["file"], row["row"]): row["reason"] for row in bad}
    assert len(reasons) == len(bad)
    return rows_of(output), reasons


def test_a_killed_run_goes_on_where_it_stopped_on_a_cluster_without_this_project(model, tmp_path, capsys):
    expected, out, log = write_folder(tmp_path / "in", 30), tmp_path / "out", tmp_path / "log.txt"
    elsewhere = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "PYTHONPATH": ""}
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2"]
    command += ["--include-dashboard=false", "--object-store-memory=80000000", "--disable-usage-stats"]
    with log.open("w") as file:
        cluster = subprocess.Popen(command, cwd=tmp_path / "in", env=elsewhere, stdout=file, stderr=file)
    try:
        while not (address := re.search(r"--address='([^']+)'", log.read_text())):
            assert cluster.poll() is None, log.read_text()
            time.sleep(0.1)
        command = f"{sys.executable} -m scripts.annotate {model} in out --unit-rows=1 --address={address[1]}".split()
        # relative names are the command's, not the cluster's
        options = {"cwd": tmp_path, "env": elsewhere | {"PYTHONPATH": str(ROOT)}}
        run = subprocess.Popen(command, **options)
        while len(list(out.glob("part-*"))) < 3:
            assert run.poll() is None
            time.sleep(0.02)
        run.kill()
        run.wait()
        written = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
        assert len(written) < 90
        subprocess.run(command, check=True, **options)
    finally:
        cluster.terminate()
        cluster.wait()
    assert rows_of(out) == expected
    assert all(path.stat().st_mtime_ns == changed for path, changed in written.items())
    assert {path.name for path in out.glob("[_.]*")} == {"_manifest.json", "_lock"}
    script.main(str(model), tmp_path / "in", out, unit_rows=1)
    assert "nothing left to do" in capsys.readouterr().out


class Dying(Annotator):
    """Is killed once by the unit that begins with row 0, and always by the one that begins with row 10."""

    def annotate(self, unit):
        with (self.output / f"_{unit.first}").open("a") as file:
            file.write(".")
        if unit.first == 10 or (unit.first == 0 and (self.output / "_0").stat().st_size == 1):
            os.kill(os.getpid(), 9)
        return super().annotate(unit)


def test_a_killed_worker_loses_nothing_and_a_unit_that_kills_every_worker_is_given_up(model, tmp_path, monkeypatch):
    settings = {"model": identify(str(model)), "precision": None, "max_chars": 100}
    rows = [(f"A Bari {n}", None) for n in range(50)]
    todo = (Unit(f"part-{first}.parquet", "in", first, rows[first : first + 10]) for first in range(0, 50, 10))
    ray = script.start_ray("", 2)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(script, "Annotator", Dying)
    with pytest.raises(UserError, match=r"1 unit\(s\); in, 10 rows from row 10: 4 workers died"):
        script.annotate(ray, next(todo), todo, (str(model), tmp_path, settings, 1, False), 2)
    ray.shutdown()
    assert [(tmp_path / name).stat().st_size for name in ("_0", "_10", "_20")] == [2, 4, 1]
    assert [row for _, row in sorted(rows_of(tmp_path))] == [*range(10), *range(20, 50)]


def test_a_unit_of_long_texts_ends_early_so_that_memory_is_bounded(tmp_path):
    size = UNIT_CHARS // 4
    (tmp_path / "in.jsonl").write_text(f'{{"text": "{"x" * size}"}}\n' * 12)
    found = units({"in": tmp_path / "in.jsonl"}, "text", size, 10_000)
    assert [(unit.first, len(unit.rows)) for unit in found] == [(0, 5), (5, 5), (10, 2)]


JSONL = {
    b'\xef\xbb\xbf{"text": "Bari"}': "",
    b'{"text": null}': "null",
    b'{"text": 5}': "not a string: int",
    b'{"text": "' + b"x" * 1001 + b'"}': "too long: 1,001",
    b'{"text": "' + b"x" * 200_000 + b'"}': "not JSON",  # longer than the test's LIMIT
    b"": "not JSON",
    b"[1]": "not a JSON object",
    b'{"testo": "Bari"}': "no 'text'",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "not UTF-8",
    b"[" * 90_000: "not JSON",
    b'{"altro": "\xff", "text": "Bari"}': "",
}
CSV = {
    b"\xef\xbb\xbftext,id,n": None,
    b"Bari": "1 cells, the header has 3",
    b"": None,  # a blank line is no row
    b"Bari,2,3,4": "4 cells",
    b"Bari,\xff,1": "",
    b"\xff,3,1": "not UTF-8",
    b"x" * 1001 + b",4,1": "too long",
}
ARRAY = pyarrow.array([b"Bari", None, b"\xff", b"x" * 1001, b"Bari"], pyarrow.binary()).view(pyarrow.string())
PARQUET = {0: "", 1: "null", 2: "not UTF-8", 3: "too long", 4: ""}


@pytest.mark.parametrize(("name", "rows"), [("in.jsonl", JSONL), ("in.csv", CSV), ("in.parquet", PARQUET)])
def test_bad_rows_are_named_with_the_reason(model, tmp_path, monkeypatch, name, rows):
    monkeypatch.setattr("scripts.annotate.units.LIMIT", 100_000)
    if rows is PARQUET:
        pyarrow.parquet.write_table(pyarrow.table({"text": ARRAY}), tmp_path / name, row_group_size=2)
    else:
        (tmp_path / name).write_bytes(b"\n".join(rows) + b"\n")
    good, bad = annotate_file(spacy.load(model), tmp_path / name, tmp_path / "out")
    reasons = {(name, row): reason for row, reason in enumerate(r for r in rows.values() if r is not None)}
    assert {key: text for key, (text, _) in good.items()} == {key: "Bari" for key in reasons if not reasons[key]}
    assert bad.keys() == {key for key in reasons if reasons[key]}
    assert [reasons[key] for key in bad if not bad[key].startswith(reasons[key])] == []


def test_a_text_on_which_the_pipeline_fails_is_a_bad_row_unless_it_always_fails(tmp_path):
    nlp = spacy.blank("it")
    (tmp_path / "in.jsonl").write_text('{"text": "Gela"}\n{"text": "da Gela a Bari"}\n{"text": "Nuoro"}\n')
    nlp.max_length = 10
    rows, bad = annotate_file(nlp, tmp_path / "in.jsonl", tmp_path / "out")
    assert [text for text, _ in rows.values()] == ["Gela", "Nuoro"]
    assert bad["in.jsonl", 1].startswith("the pipeline fails: ValueError: [E088]")
    nlp.max_length = 3
    with pytest.raises(ValueError, match="E088"):
        annotate_file(nlp, tmp_path / "in.jsonl", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("precision", [None, "int8"])
def test_scores_and_precision_are_those_of_the_pipeline(tiny_encoder, tmp_path, monkeypatch, precision):
    pipeline(tiny_encoder, precision="bfloat16").to_disk(tmp_path / "model")
    monkeypatch.setattr("scripts.annotate.worker.identify", lambda *_: "it")  # it refuses a folder of this project
    settings = {"model": "it", "precision": precision, "max_chars": 1000}
    annotator = Annotator(str(tmp_path / "model"), tmp_path / "out", settings, 1, False)
    texts = [f"La riga {n} va da Bari a Roma." for n in range(20)]
    assert annotator.annotate(Unit("part.parquet", "in", 0, [(text, None) for text in texts])) == 0
    assert annotator.nlp.config["components"]["transformer"]["model"]["precision"] == (precision or "bfloat16")
    found = [entity for row in range(20) for entity in rows_of(tmp_path / "out")["in", row][1]]
    entities = [e for doc in annotator.nlp.pipe(texts) for e in doc.ents]
    assert [entity[:3] for entity in found] == [(e.start_char, e.end_char, e.label_) for e in entities] != []
    assert [entity[3] for entity in found] == pytest.approx([e._.panx_score for e in entities], abs=1e-6)


def test_an_installed_package_is_known_by_its_name(project, tmp_path):
    (wheel,) = (project / "packages").rglob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # in another process, since the package would replace this project's factories here
    code = "from scripts.annotate.worker import identify; print(identify('it_panx_xlmr', 'int8'))"
    run = ["env", f"PYTHONPATH={tmp_path}", sys.executable, "-c", code]
    assert subprocess.check_output(run, cwd=ROOT, text=True).startswith("it_panx_xlmr 2.0.0 ")
    with pytest.raises(UserError, match="neither an installed pipeline"):
        identify("spacy-transformers")  # the name of an installed project, which cannot be imported


def test_a_run_goes_on_only_with_what_it_was_begun_with(model, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "start_ray", lambda *_: (_ for _ in ()).throw(UserError("Stopped.")))
    run = (model, tmp_path / "in", tmp_path / "out")
    write_folder(tmp_path / "in", 5)
    assert "not created by this command" in refused(script, *run[:2], model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "._manifest.json.partial-host-1").write_text("{")  # of a run that was killed as it began
    assert "Stopped" in refused(script, *run)
    assert "Stopped" in refused(script, *run)
    assert "max_chars was 100000, and is now 5" in refused(script, *run, "--max-chars", 5)
    spacy.blank("it").to_disk(tmp_path / "other")
    assert "model was it_pipeline" in refused(script, tmp_path / "other", *run[1:])
    with script.only_one(tmp_path / "out"):
        assert "another run writes there" in refused(script, *run)
    (tmp_path / "in" / "d.jsonl").write_text('{"text": "Nuoro"}\n')
    assert "d.jsonl was None, and is now [18, " in refused(script, *run)
    (tmp_path / "in" / "d.jsonl").rename(tmp_path / "in" / "b.jsonl")
    assert "b.jsonl was " in refused(script, *run)
    assert "a.parquet: the column 'id' is int64, not strings" in refused(script, *run, "--column", "id")
    found = units({"a.parquet": tmp_path / "in" / "a.parquet"}, "text", 100, 1)
    with pytest.raises(UserError, match="another pipeline on this machine; install the same wheel"):
        Annotator(str(model), tmp_path, {"model": "it_places 0.0.0 0"}, 1, False).annotate(next(found))
    (tmp_path / "in" / "a.parquet").touch()
    with pytest.raises(UserError, match="changed while it was read"):
        list(found)


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("a.parquet", b"PAR1 no", (), "a.parquet: not a whole Parquet file"),
        ("a.csv", b"id,testo\n1,Bari\n", (), "a.csv: no column 'text'; its columns are 'id', 'testo'"),
        ("a.csv", b"", (), "a.csv: no column 'text'; its columns are none"),
        ("a.csv", b"text,text\n1,Bari\n", (), "a.csv: 2 columns are called 'text'"),
        ("a.csv", b'text\n"Bari\nGela\n', (), "a.csv, line 3: not CSV (unexpected end of data); check its quotes"),
        ("a.csv", b'text\n"' + b"x" * 200_000, (), "a.csv, line 3: not CSV (field larger"),
        ("a.jsonl", b'{"testo": "Bari"}\n', (), "a.jsonl: no column 'text'; its columns are 'testo'"),
        ("a.txt", b"Bari\n", (), "no .parquet, .csv, .jsonl file"),
        (os.fsdecode(b"citt\xe0.jsonl"), b"", (), "the file's name is not UTF-8"),
        ("no_such", b"", (), "no_such: neither an installed pipeline nor a pipeline's folder"),
        ("project", b"", (), "install the wheel"),  # other machines lack this project's code
        ("blank", b"", ("--precision", "int8"), "no setting `precision`"),
        ("blank", b"", ("--precision", "int8", "--gpus-per-worker", 1), "int8 is for CPUs"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(refused, tmp_path, monkeypatch, name, content, options, expected):
    monkeypatch.setattr("scripts.annotate.units.LIMIT", 100_000)
    spacy.blank("it").to_disk(tmp_path / "blank")
    tokenizer = {"nlp": {"tokenizer": {"@tokenizers": "panx_xlmr.Tokenizer.v2"}}}
    spacy.blank("it", config=tokenizer).to_disk(tmp_path / "project")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / (name if "." in name else "a.jsonl")).write_bytes(content)
    model = tmp_path / ("blank" if "." in name else name)
    assert expected in refused(script, model, tmp_path / "in", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_an_earlier_output_and_a_link_to_a_folder_are_not_read(tmp_path, capsys):
    (tmp_path / "in" / "earlier").mkdir(parents=True)
    for name in ("a.csv", "earlier/_manifest.json", "earlier/part.csv"):
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    assert list(input_files(tmp_path / "in", tmp_path / "in" / "out")) == ["a.csv"]
    assert "Skipped 1 file(s)" in capsys.readouterr().out
    (odd := tmp_path / os.fsdecode(b"citt\xe0.csv")).touch()
    with pytest.raises(UserError, match="not UTF-8"):
        input_files(odd, tmp_path / "out")


def test_workers_fit_where_one_machine_has_the_cpus_and_gpus_of_each():
    nodes = [{"CPU": 3.0}, {"CPU": 16.0, "GPU": 1.0}, {"memory": 1.0}]
    nodes = [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"CPU": 99.0}}]
    assert [script.fitting_workers(nodes, *needs) for needs in ((2, 0), (1, 1), (1, 0.5), (4, 0))] == [9, 1, 2, 4]
    with pytest.raises(UserError, match="No worker fits: each needs 17 CPUs"):
        script.fitting_workers(nodes, 17, 0)
