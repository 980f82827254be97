"""What an app may expect of the installed package, which has learnt a few sentences by heart: a fresh venv with the
wheel and what it declares, offline, in a folder of its own.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import spacy
import srsly
from spacy.tokens import DocBin

from conftest import ROOT

# runs one piece of code a line and answers with what it leaves in `result`, or with its traceback
LOOP = """
import json, sys, traceback
import spacy
nlp = spacy.load("it_panx_xlmr")
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    names = {"spacy": spacy, "nlp": nlp}
    try:
        exec(json.loads(line), names)
        answer = {"result": names["result"]}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def python(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The venv's Python; versions are those of requirements.txt, what is installed is what the wheel declares."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (wheel,) = (project / "packages").rglob("*.whl")
    pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "requirements.txt", wheel], check=True)
    return venv / "bin" / "python"


@pytest.fixture(scope="session")
def offline() -> dict[str, str]:
    """The whole environment in which the package runs: no hub, nothing of this project."""
    return {"HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def run(
    python: Path, offline: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Any]]:
    """Runs code in the venv, where `nlp` is the package, and gives what it leaves in `result`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with subprocess.Popen(
        [python, "-c", LOOP], cwd=folder, env=offline, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def call(code: str) -> Any:
            process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert "error" not in answer, answer["error"]
            return answer["result"]

        yield call
        process.stdin.close()


TEXTS = ["Bari", "", "Sevilla è lontana da Bari.", "hola"]


def test_it_finds_entities(run):
    assert run("result = [(e.text, e.label_) for e in nlp('Bari').ents]") == [["Bari", "LOC"]]


def test_it_predicts_what_the_trained_pipeline_does(project, run):
    trained = spacy.load(project / "training" / "model")
    gold = DocBin().from_disk(project / "corpus" / "test.spacy").get_docs(trained.vocab)
    texts = [doc.text for doc in gold]
    expected = [[ent.text for ent in doc.ents] for doc in trained.pipe(texts)]
    assert run(f"result = [[e.text for e in d.ents] for d in nlp.pipe({texts!r})]") == expected


def test_entities_have_probabilities(run):
    scores = run("result = [e._.panx_score for e in nlp('Bari').ents]")
    assert len(scores) == 1
    assert 0 < scores[0] <= 1


def test_streams_have_their_context_and_any_batch_size_gives_the_same(run):
    code = f"""
        pairs = [(text, i) for i, text in enumerate({TEXTS!r})]
        result = []
        for size in (1, 2, 1000):
            result.append([(i, doc.to_json()["ents"]) for doc, i in nlp.pipe(pairs, as_tuples=True, batch_size=size)])
    """
    first, *others = run(code)
    assert [i for i, _ in first] == [0, 1, 2, 3]
    assert all(other == first for other in others)


def test_one_by_one_gives_what_a_stream_gives(run):
    code = f"result = [[d.to_json()['ents'] for d in ds] for ds in (nlp.pipe({TEXTS!r}), map(nlp, {TEXTS!r}))]"
    stream, single = run(code)
    assert stream == single


def test_several_processes_give_the_same(python, offline, tmp_path):
    (tmp_path / "several.py").write_text(
        "import spacy\n"
        "if __name__ == '__main__':\n"
        "    nlp = spacy.load('it_panx_xlmr')\n"
        f"    texts = {TEXTS!r} * 3\n"
        "    one, two = ([d.to_json() for d in nlp.pipe(texts, n_process=n, batch_size=2)] for n in (1, 2))\n"
        "    print(one == two)\n"
    )
    # threads that PyTorch has started must not be waited for in a forked process, which does not have them
    settings = offline | {"OMP_NUM_THREADS": "2"}
    command = [python, "several.py"]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=180)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_pipes_can_be_left_out(run):
    code = """
        with nlp.select_pipes(disable=["transformer", "ner"]):
            without = len(nlp("Bari").ents)
        result = [without, len(nlp("Bari").ents)]
    """
    assert run(code) == [0, 1]


def test_it_lets_go_of_the_transformers_vectors_unless_they_are_wanted(run):
    code = """
        released = nlp("Bari")._.trf_data is None
        with nlp.select_pipes(disable=["doc_cleaner"]):
            result = [released, nlp("Bari")._.trf_data is None]
    """
    assert run(code) == [True, False]


def test_it_goes_to_disk_to_bytes_and_through_pickle(run):
    code = """
        import pickle
        text = "Sevilla e Bari"
        nlp.to_disk("copy")
        copies = [spacy.load("copy"), pickle.loads(pickle.dumps(nlp))]
        result = [[d.to_json() for d in map(pipeline, [text])] for pipeline in [nlp, *copies]]
    """
    original, loaded, unpickled = run(code)
    assert loaded == unpickled == original


@pytest.mark.parametrize("place", ["before='transformer'", "after='ner'"])
def test_a_ruler_or_a_sentencizer_can_stand_before_and_after_it(run, place):
    code = f"""
        nlp = spacy.load("it_panx_xlmr")
        nlp.add_pipe("sentencizer", {place})
        nlp.add_pipe("entity_ruler", {place}).add_patterns([{{"label": "FOOD", "pattern": "focaccia"}}])
        doc = nlp("Bari. La focaccia.")
        result = [len(list(doc.sents)), sorted((e.text, e.label_) for e in doc.ents)]
    """
    sentences, entities = run(code)
    assert sentences == 2
    assert ["focaccia", "FOOD"] in entities
    assert ["Bari", "LOC"] in entities


def test_another_pipeline_can_take_its_pipes(run):
    code = """
        other = spacy.blank("it", vocab=nlp.vocab)
        for name in ("transformer", "ner"):
            other.add_pipe(name, source=nlp)
        result = [(e.text, e.label_) for e in other("Bari").ents]
    """
    assert run(code) == [["Bari", "LOC"]]


def test_it_evaluates_and_can_be_trained_further_without_the_project(run):
    code = """
        from spacy.training import Example
        nlp = spacy.load("it_panx_xlmr")
        examples = [Example.from_dict(nlp.make_doc("Bari"), {"entities": [(0, 4, "LOC")]})]
        before = nlp.evaluate(examples)["ents_f"]
        loss = nlp.update(examples, sgd=nlp.resume_training())["ner"]
        result = [before, loss >= 0]
    """
    assert run(code) == [1.0, True]


HOSTILE = {
    "white space": " \n\t ",
    "emoji": "👩‍👩‍👧 a Bari 🇮🇹",
    "zero-width": "Ba\u200bri \ufeff \u200d Bari",
    "right to left": "\u202eirab\u202c القاهرة Bari",
    "one word of 20,000 characters": "x" * 20_000,
    "elision at the end": "dell'",
    "only punctuation": "«»“”''...!?" * 50,
    "other scripts": "東京 Москва Αθήνα दिल्ली",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_entities_lie_in_any_text(run, name):
    text = HOSTILE[name]
    entities = run(f"result = [(e.start_char, e.end_char, e.text) for e in nlp({text!r}).ents]")
    for start, end, words in entities:
        assert text[start:end] == words
        assert words.strip() == words
    assert all(a[1] <= b[0] for a, b in zip(entities, entities[1:], strict=False))


def test_a_document_of_a_megabyte_passes(run):
    assert run("result = len(nlp('Sevilla è lontana da Bari. ' * 37_000).ents)") > 0


def test_memory_stays_where_it_is_over_100000_documents(run):
    code = f"""
        import itertools, os
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        after = []
        texts = itertools.islice(itertools.cycle({TEXTS!r}), 100_000)
        for number, doc in enumerate(nlp.pipe(texts), start=1):
            if number in (20_000, 100_000):
                after.append(resident())
        result = after
    """
    early, late = run(code)
    assert late < early * 1.05 + 20, f"{early:.0f} MB after 20,000 documents, {late:.0f} MB after 100,000"


def test_spacy_info_tells_about_it(python, offline, tmp_path):
    command = [python, "-m", "spacy", "info", "it_panx_xlmr"]
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "panx_xlmr" in done.stdout


# spaCy's own table of compatible packages, which `spacy validate` asks the network for, does not know this package
VALIDATE = """
import http.server, threading
import spacy.about, spacy.cli
class Table(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"spacy": {"3.8": {"it_core_news_lg": ["3.8.0"]}}}')
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Table)
threading.Thread(target=server.serve_forever, daemon=True).start()
spacy.about.__compatibility__ = f"http://127.0.0.1:{server.server_port}"
spacy.cli.app(["validate"])
"""


def test_spacy_validate_finds_it_compatible(python, offline, tmp_path):
    plain = offline | {"ANSI_COLORS_DISABLED": "1"}
    done = subprocess.run([python, "-c", VALIDATE], cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [line.split() for line in done.stdout.splitlines() if "panx" in line]
    assert row[1:] == [">=3.8.0,<3.9.0", "2.0.0", "✔"]


def test_spacy_evaluate_takes_it_by_name(project, python, offline, tmp_path):
    command = ["evaluate", "it_panx_xlmr", project / "corpus" / "test.spacy", "--gold-preproc", "--output", "m.json"]
    subprocess.run([python, "-m", "spacy", *command], cwd=tmp_path, env=offline, check=True)
    test = srsly.read_json(project / "metrics" / "test.json")
    assert srsly.read_json(tmp_path / "m.json")["ents_f"] == test["ents_f"]
