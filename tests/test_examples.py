"""The programs in examples/: files through the real function, service and page as processes with real clients."""

import csv
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import spacy
import srsly

import annotate_column
from conftest import ROOT

EXAMPLES = ROOT / "examples"
TEXTS = ["Rita visse a Torino.", "", "😀 A Bari, poi a Torino", "niente"]
# the service with a pipeline that writes down what it computes, waits for a file at one word and fails at another
SLOW = """
import asyncio, os, time
from pathlib import Path
from spacy.language import Language
from spacy.tokens import Span

folder = Path(os.environ["FOLDER"])
Span.set_extension("score", default=None)

@Language.component("slow")
def slow(doc):
    with open(folder / "computed", "a") as file:
        file.write(doc.text + "|")
    while doc.text.startswith("aspetta") and not (folder / "open").exists():
        time.sleep(0.01)
    assert doc.text != "rotto"
    return doc

import service
service.nlp.add_pipe("slow", first=True)
service.SECONDS, service.queue = 4, asyncio.Queue(2)
app = service.app
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline that loads at once and knows three names."""
    nlp = spacy.blank("it")
    patterns = [("PER", "Rita"), ("LOC", "Torino"), ("LOC", "Bari")]
    nlp.add_pipe("entity_ruler").add_patterns([{"label": label, "pattern": name} for label, name in patterns])
    folder = tmp_path_factory.mktemp("ruler") / "model"
    nlp.to_disk(folder)
    return folder


def found_by(model, texts):
    keys = ("text", "label", "start", "end", "score")
    return [
        [dict(zip(keys, (e.text, e.label_, e.start_char, e.end_char, e._.panx_score), strict=True)) for e in doc.ents]
        for doc in spacy.load(model).pipe(texts)
    ]


def annotate(source, target, model, column="text"):
    annotate_column.annotate(source, target, column, str(model))


def test_jsonl_rows_keep_what_they_had_and_get_their_entities(model, tmp_path):
    rows = [{"id": n, "deep": {"a": [None]}, "text": text} for n, text in enumerate(TEXTS * 200)]
    srsly.write_jsonl(tmp_path / "in.jsonl", rows)
    annotate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model)
    expected = found_by(model, TEXTS) * 200
    assert list(srsly.read_jsonl(tmp_path / "out.jsonl")) == [
        row | {"entities": entities} for row, entities in zip(rows, expected, strict=True)
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_rows_keep_their_separator_and_their_line_breaks(model, tmp_path, separator):
    texts = [*TEXTS, f'Torino{separator} "detta"\nBari', "Bari\rRoma"]
    with (tmp_path / "in.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("n", "testo"), *enumerate(texts)])
    annotate(tmp_path / "in.csv", tmp_path / "out.csv", model, "testo")
    with (tmp_path / "out.csv").open(encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=separator))
    assert [row["testo"] for row in rows] == texts
    assert [json.loads(row["entities"]) for row in rows] == found_by(model, texts)


def test_from_jsonl_to_csv_no_key_of_any_row_is_lost(model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "Bari"}\n\n{"text": "x", "n": [1, "è"], "m": null}\n', encoding="utf8")
    annotate(tmp_path / "in.jsonl", tmp_path / "out.csv", model)
    with (tmp_path / "out.csv").open(encoding="utf8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["text"], first["n"], json.loads(first["entities"])[0]["label"]) == ("Bari", "", "LOC")
    assert (second["n"], second["m"], second["entities"]) == ('[1, "è"]', "", "[]")


@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.csv", b"id,text\n1,Bari\n2\n", 3, "too few"),
        ("a.csv", b"id,text\n1,Bari,3\n", 2, "too many"),
        ("a.csv", b"text,text\n1,Bari\n", 2, "one name"),
        ("a.csv", b"id,testo\n1,Bari\n", 2, "no text in 'text'"),
        ("a.csv", b'id,text\n1,"Bari\n', 2, "unexpected end"),
        ("a.csv", b"id,text\n1,Bari\n2,citt\xe0\n", 3, "UTF-8"),
        ("a.csv", b"entities,text\n1,Bari\n", 2, "'entities'"),
        ("a.jsonl", b'{"text": "Bari"}\n\n{"text": null}\n', 3, "no text in 'text'"),
        ("a.jsonl", b'{"text": "Bari"}\n{"testo": "Bari"}\n', 2, "no text in 'text'"),
        ("a.jsonl", b'{"text": "Bari"}\n{"text": \n', 2, "one JSON object a line"),
        ("a.jsonl", b'["Bari"]\n', 1, "no text in 'text'"),
        ("a.jsonl", b"[" * 100_000, 1, "one JSON object a line"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', 1, "surrogates"),
        ("a.jsonl", b'{"text": "citt\xe0"}\n', 1, "UTF-8"),
        ("a.jsonl", b'{"text": "%s"}\n' % (b"a" * 1_000_001), 1, "1,000,000"),
    ],
)
def test_a_bad_row_is_one_sentence_with_its_line_and_nothing_is_written(model, tmp_path, name, content, line, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        annotate(tmp_path / name, tmp_path / "out.jsonl", model)
    message = stopped.value.code
    assert message.startswith(f"{tmp_path / name}, line {line}: ")
    assert said in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_earlier_file_stays_whole_where_writing_fails(model, tmp_path, monkeypatch):
    srsly.write_jsonl(tmp_path / "in.jsonl", [{"text": "Bari"}])
    (tmp_path / "out.jsonl").write_text("earlier")
    monkeypatch.setattr("annotate_column.minibatch", lambda rows, size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        annotate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", model)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    assert (tmp_path / "out.jsonl").read_text() == "earlier"


def test_the_trained_pipeline_annotates_a_file_as_nlp_pipe_does(project, tmp_path):
    srsly.write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in ("Bari", "", "hola")])
    annotate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", project / "training" / "model")
    found = [row["entities"] for row in srsly.read_jsonl(tmp_path / "out.jsonl")]
    expected = found_by(project / "training" / "model", ["Bari", "", "hola"])
    assert [[e | {"score": pytest.approx(e["score"], abs=1e-4)} for e in doc] for doc in expected] == found
    assert [e["label"] for e in found[0]] == ["LOC"]


@pytest.mark.parametrize("target", ["out.jsonl", "out.txt"])
def test_the_command_refuses_with_one_line_and_exit_code_1(tmp_path, target):
    command = [sys.executable, EXAMPLES / "annotate_column.py", "none.csv", target]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "none.csv" in result.stderr


def address_in(output):
    """The port that a server says it listens at; None if it ends before."""
    for line in output:
        if said := re.search(r"running on .*http://127.0.0.1:(\d+)", line, re.IGNORECASE):
            threading.Thread(target=output.read, daemon=True).start()  # a full pipe would stop the server
            return int(said[1])
    return None


def until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


class Service:
    """The service in a process of its own."""

    def __init__(self, folder, model):
        self.folder = folder
        (folder / "slow.py").write_text(SLOW)
        environment = os.environ | {"MODEL": str(model), "FOLDER": str(folder), "PYTHONPATH": str(EXAMPLES)}
        command = [sys.executable, "-m", "uvicorn", "--app-dir", folder, "slow:app", "--port", "0"]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        self.port = address_in(self.process.stderr)
        assert self.port
        return self

    def __exit__(self, *_):
        self.open()
        self.process.kill()
        self.process.wait()

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.status, json.loads(response.read() or b"null") if response.status != 500 else None
        connection.close()
        return *answer, response.headers

    def entities(self, *texts):
        return self.ask("POST", "/entities", json.dumps({"texts": texts}))

    def computed(self):
        file = self.folder / "computed"
        return file.read_text().split("|") if file.exists() else []

    def open(self):
        (self.folder / "open").touch()

    def close(self):
        (self.folder / "open").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def started(tmp_path_factory, model):
    with Service(tmp_path_factory.mktemp("service"), model) as service:
        yield service


@pytest.fixture
def service(started):
    started.close()
    yield started
    started.open()


def test_requests_that_come_together_get_what_nlp_pipe_gives(service, model):
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda n: service.entities(*TEXTS[n % 4 :]), range(40)))
    assert [answer[0] for answer in answers] == [200] * 40
    expected = found_by(model, TEXTS)
    assert [answer[1]["entities"] for answer in answers] == [expected[n % 4 :] for n in range(40)]


def test_a_full_queue_is_503_while_health_answers_and_those_that_wait_are_computed(service):
    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(service.entities, "aspetta uno")]
        until(lambda: "aspetta uno" in service.computed())
        for waiting in (1, 2):
            answers.append(clients.submit(service.entities, "Bari"))
            until(lambda n=waiting: service.ask("GET", "/health")[1]["waiting"] == n)
        status, answer, headers = service.entities("Bari")
        service.open()
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "try again" in answer["detail"]
        assert [answer.result()[0] for answer in answers] == [200] * 3


def test_a_request_out_of_time_is_504_and_not_computed_if_it_only_waited(service):
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(service.entities, "aspetta due")
        until(lambda: "aspetta due" in service.computed())
        assert service.entities("in fila")[0] == 504
        assert first.result()[0] == 504
    service.open()
    assert service.entities("dopo")[0] == 200
    assert "in fila" not in service.computed()
    assert "dopo" in service.computed()


def test_a_request_whose_client_has_gone_is_not_computed(service):
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(service.entities, "aspetta tre")
        until(lambda: "aspetta tre" in service.computed())
        connection = http.client.HTTPConnection("127.0.0.1", service.port)
        connection.request("POST", "/entities", '{"texts": ["andato"]}')
        until(lambda: service.ask("GET", "/health")[1]["waiting"] == 1)
        connection.close()
        service.ask("GET", "/health")  # whatever the server has to do with the closed connection comes before this
        service.open()
        assert first.result()[0] == 200
    assert service.entities("poi")[0] == 200
    assert "andato" not in service.computed()


def test_a_text_on_which_the_pipeline_fails_does_not_take_others_with_it(service):
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(service.entities, "aspetta quattro")
        until(lambda: "aspetta quattro" in service.computed())
        bad, good = clients.submit(service.entities, "rotto"), clients.submit(service.entities, "Bari")
        until(lambda: service.ask("GET", "/health")[1]["waiting"] == 2)
        service.open()
        assert (first.result()[0], bad.result()[0], good.result()[0]) == (200, 500, 200)


def test_a_body_without_a_declared_length_is_cut_off(service):
    chunks = (b'{"texts": ["' + b"a" * 1000 for _ in range(200))
    assert service.ask("POST", "/entities", chunks)[0] == 413


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (json.dumps({"texts": ["a" * 10_001]}), "at most 10000 characters"),
        (json.dumps({"texts": ["a"] * 65}), "at most 64 items"),
        (json.dumps({"texts": "Bari"}), "valid array"),
        (json.dumps({"testi": ["Bari"]}), "required"),
        ('{"texts": ["\\ud800"]}', "JSON"),
        (b'{"texts": ["citt\xe0"]}', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"", "JSON"),
    ],
)
def test_a_body_that_is_not_as_expected_is_422_and_says_why(service, body, said):
    status, answer, _ = service.ask("POST", "/entities", body)
    assert status == 422
    assert said in answer["detail"]
    assert len(answer["detail"]) < 300


def test_the_documentation_tells_what_a_body_is(service):
    operation = service.ask("GET", "/openapi.json")[1]["paths"]["/entities"]["post"]
    assert "texts" in operation["requestBody"]["content"]["application/json"]["schema"]["properties"]


def test_stopping_answers_what_was_asked_before(model, tmp_path):
    with Service(tmp_path, model) as service, ThreadPoolExecutor(1) as clients:
        answer = clients.submit(service.entities, "aspetta Bari")
        until(lambda: "aspetta Bari" in service.computed())
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        service.open()
        assert answer.result()[1]["entities"][0][0]["text"] == "Bari"
        assert service.process.wait(30) in (0, -signal.SIGTERM)


def test_a_service_without_its_pipeline_says_what_to_do():
    command = [sys.executable, "-c", "import service"]
    environment = os.environ | {"MODEL": "nessuno", "PYTHONPATH": str(EXAMPLES)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "nessuno" in result.stderr
    assert "set MODEL" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that writes down each request; for what it asks, see `requests_of`."""
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver are here to open the page with: apt install chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium of requirements-dev.txt is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield window
    window.quit()


@pytest.fixture(scope="module")
def page(model):
    environment = os.environ | {"MODEL": str(model), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, EXAMPLES / "page.py"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    port = address_in(process.stdout)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()
    assert port


def test_the_page_shows_entities_as_they_are_typed_and_asks_nobody_else(browser, page):
    browser.get(page)
    until(lambda: browser.find_elements("tag name", "textarea"))
    box = browser.find_element("tag name", "textarea")
    shown = lambda: browser.find_element("id", "entities").text  # noqa: E731
    until(lambda: "Torino" in shown())  # the page begins with an example
    box.clear()
    box.send_keys("Un giorno a Bari con Rita <b>")
    until(lambda: "Bari" in shown() and "LOC" in shown() and "PER" in shown())
    assert "<b>" in shown()
    assert "Torino" not in shown()
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith((page, "data:", "blob:"))] == []
