"""The programs in examples/, with a pipeline of rules in place of a trained one."""

import asyncio
import csv
import json
import runpy
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gradio
import httpx
import pytest
import srsly
import uvicorn
from spacy.language import Language

import annotate_column
from conftest import ROOT

TEXTS = ["Rita visse a Torino.", "", "😀 A Bari, poi a Torino", "niente"]


def entities(*found):
    return [dict(zip(("text", "label", "start", "end", "score"), values, strict=True)) for values in found]


IN_FIRST = entities(("Rita", "PER", 0, 4, 0.75), ("Torino", "LOC", 13, 19, 0.5))
IN_THIRD = entities(("Bari", "LOC", 4, 8, None), ("Torino", "LOC", 16, 22, 0.5))
EXPECTED = [IN_FIRST, [], IN_THIRD, []]


def test_jsonl_rows_keep_their_keys_and_get_their_entities(model, tmp_path):
    rows = [{"id": n, "text": text} for n, text in enumerate(TEXTS * 100)] + [{"text": "", "n": [1, "è"], "m": None}]
    srsly.write_jsonl(tmp_path / "in.jsonl", rows)
    for name in ("out.jsonl", "out.csv"):
        annotate_column.annotate(tmp_path / "in.jsonl", tmp_path / name, model=model)
    expected = [row | {"entities": found} for row, found in zip(rows, [*EXPECTED * 100, []], strict=True)]
    assert list(srsly.read_jsonl(tmp_path / "out.jsonl")) == expected
    with (tmp_path / "out.csv").open(encoding="utf8", newline="") as file:
        first, *_, last = csv.DictReader(file)
    assert (json.loads(first["entities"]), first["n"], last["n"]) == (EXPECTED[0], "", '[1, "è"]')


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_rows_keep_their_separator_and_their_line_breaks(model, tmp_path, separator):
    texts = [*TEXTS, f'x{separator} "detta"\ny', "x\ry"]
    with (tmp_path / "in.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("n", "testo"), *enumerate(texts)])
    annotate_column.annotate(tmp_path / "in.csv", tmp_path / "out.csv", "testo", model)
    with (tmp_path / "out.csv").open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=separator))
    assert [row["testo"] for row in rows] == texts
    assert [json.loads(row["entities"]) for row in rows] == [*EXPECTED, [], []]
    (tmp_path / "in.csv").write_text(f"n{separator}testo\n")
    annotate_column.annotate(tmp_path / "in.csv", tmp_path / "out.csv", "testo", model)
    assert (tmp_path / "out.csv").read_text() == f"n{separator}testo{separator}entities\n"


@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.csv", b"id,testo\n", 1, "no column 'text'"),
        ("a.csv", b"id,text\n1,Bari\n2\n", 3, "missing"),
        ("a.csv", b"id,text\n1,Bari,3\n", 2, "left over"),
        ("a.csv", b"text,text\n1,Bari\n", 2, "same name"),
        ("a.csv", b'id,text\n1,"Bari\n', 2, "unexpected end"),
        ("a.csv", b"id,text\n1,Bari\n2,citt\xe0\n", 3, "UTF-8"),
        ("a.csv", b"entities,text\n1,Bari\n", 2, "'entities'"),
        ("a.jsonl", b'{"text": "Bari"}\n\n{"text": null}\n', 3, "no text in the column 'text'"),
        ("a.jsonl", b'{"text": "Bari"}\n{"text": \n', 2, "one JSON object a line"),
        ("a.jsonl", b"[" * 100_000, 1, "one JSON object a line"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', 1, "surrogates"),
        ("a.jsonl", b'{"text": "%s"}\n' % (b"a" * 1_000_001), 1, "1,000,000"),
    ],
)
def test_a_bad_row_is_one_sentence_with_its_line_and_nothing_is_written(tmp_path, name, content, line, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=said) as stopped:
        annotate_column.annotate(tmp_path / name, tmp_path / "out.jsonl")
    assert stopped.value.code.startswith(f"{tmp_path / name}, line {line}: ")
    assert "\n" not in stopped.value.code
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_earlier_file_stays_if_writing_fails(model, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"text": "Bari"}')
    (tmp_path / "out.jsonl").write_text("earlier")
    monkeypatch.setattr("annotate_column.entities_of", lambda doc: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        annotate_column.annotate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model=model)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    assert (tmp_path / "out.jsonl").read_text() == "earlier"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("annotate_column.py none.csv out.jsonl", "none.csv"),
        ("annotate_column.py none.csv out.txt", ".jsonl"),
        ("service.py", "set MODEL"),
        ("page.py", "set MODEL"),
    ],
)
def test_a_missing_file_or_package_is_one_sentence(monkeypatch, command, said):
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setenv("MODEL", "nessuno")
    with pytest.raises(SystemExit, match=said) as stopped:
        runpy.run_path(str(ROOT / "examples" / sys.argv[0]), run_name="__main__")
    assert "\n" not in stopped.value.code


def test_the_page_shows_entities_and_loads_no_fonts_from_other_servers(model, monkeypatch):
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: launched.update(options))
    page = runpy.run_path(str(ROOT / "examples" / "page.py"), run_name="__main__")
    assert page["entities"]("A Bari <b>")["entities"] == [{"entity": "LOC", "start": 2, "end": 6}]
    assert page["entities"]("a" * 6_000) == {"text": "a" * 5_000, "entities": []}
    assert gradio.utils.get_theme(launched.get("theme"))._stylesheets == []


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def service(model):
    """The service's module; its pipeline waits at `aspetta` until the gate opens, and fails at `rotto`."""
    import service  # loads the pipeline

    service.gate, service.computed = threading.Event(), []

    @Language.component("slow")
    def slow(doc):
        service.computed.append(doc.text)
        assert doc.text != "rotto"
        assert not doc.text.startswith("aspetta") or service.gate.wait(60)
        return doc

    service.nlp.add_pipe("slow", first=True)
    return service


@pytest.fixture
def client(service, monkeypatch):
    """A client of the service, which runs in a thread; `client.ask` sends texts and returns a future."""
    monkeypatch.setattr(service, "queue", asyncio.Queue(2))
    server = uvicorn.Server(uvicorn.Config(service.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    url = "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client, ThreadPoolExecutor(4) as pool:
        client.ask = lambda *texts, **options: pool.submit(client.post, "/entities", json={"texts": texts}, **options)
        client.waiting = lambda: client.get("/health").json()["waiting"]
        client.server = server
        yield client
        service.gate.set()
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def busy(service, client):
    """The answer to come to a request that the service computes until `service.gate` is set."""
    service.gate.clear()
    service.computed.clear()
    answer = client.ask("aspetta Bari")
    until(lambda: service.computed)
    return answer


def test_concurrent_requests_get_what_nlp_pipe_gives(client):
    for n in range(4):
        answers = client.ask(*TEXTS[n:]), client.ask(*TEXTS[:n])
        assert [answer.result().json()["entities"] for answer in answers] == [EXPECTED[n:], EXPECTED[:n]]


def test_a_full_queue_is_503_and_waiting_requests_are_answered(client, service, busy):
    answers = [busy, client.ask("Bari"), client.ask("Bari")]
    until(lambda: client.waiting() == 2)
    refused = client.ask("Bari").result()
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    service.gate.set()
    assert [answer.result().status_code for answer in answers] == [200] * 3


def test_a_request_out_of_time_is_504_and_is_not_computed_later(client, service, busy, monkeypatch):
    monkeypatch.setattr(service, "SECONDS", 0.2)
    assert client.ask("in fila").result().status_code == 504
    monkeypatch.setattr(service, "SECONDS", 30)
    service.gate.set()
    assert client.ask("dopo").result().status_code == 200
    assert service.computed == ["aspetta Bari", "dopo"]


def test_a_request_of_a_disconnected_client_is_not_computed(client, service, busy):
    with pytest.raises(httpx.ReadTimeout):
        client.ask("andato", timeout=httpx.Timeout(60, read=0.5)).result()
    until(lambda: client.waiting() == 1)
    service.gate.set()
    assert client.ask("dopo").result().status_code == 200
    assert service.computed == ["aspetta Bari", "dopo"]


def test_a_text_on_which_the_pipeline_fails_fails_alone(client, service, busy):
    bad, good = client.ask("rotto"), client.ask("Bari")
    until(lambda: client.waiting() == 2)
    service.gate.set()
    assert [answer.result().status_code for answer in (busy, bad, good)] == [200, 500, 200]


def test_stopping_answers_earlier_requests(client, service, busy):
    client.server.should_exit = True
    until(lambda: not client.server.servers[0].is_serving())
    service.gate.set()
    assert busy.result().json()["entities"][0][0]["text"] == "Bari"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ([b"a" * 1000] * 200, 413, ""),  # sent without a declared length
        (json.dumps({"texts": ["a" * 10_001]}), 422, "at most 10000 characters"),
        (json.dumps({"texts": ["a"] * 65}), 422, "at most 64 items"),
        (b'{"texts": ["citt\xe0"]}', 422, "JSON"),
    ],
)
def test_a_bad_body_is_refused_with_the_reason(client, body, status, said):
    answer = client.post("/entities", content=body)
    assert answer.status_code == status
    assert said in answer.json()["detail"]
