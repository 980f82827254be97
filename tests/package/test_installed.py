"""What an app may expect of the installed package, which has learnt a few sentences by heart.

It runs offline, in a fresh venv with the wheel and its requirements only, and in a new folder.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import spacy
import srsly
from spacy.tokens import DocBin
from spacy.util import load_config, load_model_from_config

import scripts.train  # noqa: F401  registers what training/config.cfg names
from conftest import ROOT

TEXTS = ["Bari", "", "Sevilla è lontana da Bari.", "hola"]


@pytest.fixture
def process(python, offline, tmp_path):
    """Runs the venv's Python in a new folder."""

    def call(*arguments, **environment):
        settings = {"cwd": tmp_path, "env": offline | environment, "timeout": 180}
        return subprocess.run([python, *arguments], **settings, capture_output=True, text=True, check=False)

    return call


def test_it_predicts_what_the_trained_pipeline_does(project, run):
    trained = spacy.load(project / "training" / "model")
    gold = DocBin().from_disk(project / "corpus" / "test.spacy").get_docs(trained.vocab)
    texts = [doc.text for doc in gold]
    expected = [[ent.text for ent in doc.ents] for doc in trained.pipe(texts)]
    assert run(f"result = [[e.text for e in d.ents] for d in nlp.pipe({texts!r})]") == expected


def test_several_processes_give_the_same(process):
    code = (
        "import spacy; nlp = spacy.load('it_panx_xlmr')\n"
        "for n in (1, 2):\n"
        f"    print([doc.to_json() for doc in nlp.pipe({TEXTS!r} * 3, n_process=n, batch_size=2)])\n"
    )
    # threads that PyTorch has started must not be waited for in a forked process, which does not have them
    done = process("-c", code, OMP_NUM_THREADS="2")
    one, two = done.stdout.splitlines()
    assert (one, done.stderr) == (two, "")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_eight_threads_find_what_one_finds(run, sample, precision):
    texts = [" ".join(sentence.words) for sentence in sample["train"][:40]]
    code = f"""
        from concurrent.futures import ThreadPoolExecutor
        nlp = spacy.load("it_panx_xlmr", config={{"components.transformer.model.precision": {precision!r}}})
        def find(text):
            return [(ent.start, ent.end, ent.label_, ent._.panx_score) for ent in nlp(text).ents]
        texts = {texts!r} * 2
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(find, texts))
        result = [found, list(map(find, texts))]
    """
    several, one = run(code)
    assert any(one)
    assert several == one


PIPES = ["transformer", "ner", "doc_cleaner"]
SOURCED = {"nlp": {"lang": "it", "pipeline": PIPES, "tokenizer": {"@tokenizers": "panx_xlmr.Tokenizer.v2"}}}
SOURCED |= {"components": {name: {"source": "it_panx_xlmr"} for name in PIPES}}


@pytest.mark.parametrize("first", ["import es_panx_xlmr", "import scripts.pipeline"])
def test_two_packages_and_the_projects_code_live_in_one_process(process, project, tmp_path, first):
    package = shutil.copytree(project / "packages" / "it_panx_xlmr-2.0.0" / "it_panx_xlmr", tmp_path / "es_panx_xlmr")
    (package / "it_panx_xlmr-2.0.0").rename(package / "es_panx_xlmr-2.0.0")
    for path in [*package.rglob("meta.json"), *package.rglob("config.cfg")]:
        path.write_text(re.sub(r'(lang"? ?[:=] ?)"it"', r'\1"es"', path.read_text()))
    (tmp_path / "both.py").write_text(
        "import pickle\n"
        "import spacy\n"
        f"{first}\n"
        "if __name__ == '__main__':\n"
        "    import es_panx_xlmr\n"
        "    pipelines = [spacy.load('it_panx_xlmr'), es_panx_xlmr.load()]\n"
        "    assert [nlp.lang for nlp in pipelines] == ['it', 'es']\n"
        f"    pipelines.append(spacy.util.load_model_from_config({SOURCED!r}, auto_fill=True))\n"
        "    for nlp in pipelines:\n"
        "        for way in (nlp, pickle.loads(pickle.dumps(nlp))):\n"
        "            docs = [*way.pipe(['Bari'] * 4, n_process=2, batch_size=2), way('Bari')]\n"
        "            print(*((ent.text, ent.label_) for doc in docs for ent in doc.ents))\n"
    )
    done = process("both.py", PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines() == [" ".join(["('Bari', 'LOC')"] * 5)] * 6, done.stderr


def test_saved_it_loads_in_a_new_process_that_imports_the_package(run, process, tmp_path):
    # stock `spacy package` writes no entry points for factories
    run(f"nlp.to_disk({str(tmp_path / 'saved')!r}); result = None")
    done = process("-c", "import it_panx_xlmr, spacy; print(spacy.load('saved')('Bari').ents)")
    assert (done.stdout, done.stderr) == ("(Bari,)\n", "")


def test_an_apps_own_score_stays_and_its_panx_score_is_refused(process):
    code = (
        "import spacy; from spacy.tokens import Span\n"
        "Span.set_extension({name!r}, default=7)\n"
        "(ent,) = spacy.load('it_panx_xlmr')('Bari').ents\n"
        "print(ent._.score, ent._.panx_score > 0)\n"
    )
    results = [process("-c", code.format(name=name)) for name in ("score", "panx_score")]
    assert results[0].stdout == "7 True\n"
    assert "panx_score is the package's own; give yours another name." in results[1].stderr


def test_scores_go_where_their_entities_go(run):
    code = """
        import warnings
        from spacy.tokens import Doc, DocBin
        warnings.filterwarnings("error", "\\[W101\\]")  # user data that from_docs drops
        doc = nlp("Bari e Bari")
        stored = DocBin(docs=[doc], store_user_data=True).to_bytes()
        merged = doc.copy()
        with merged.retokenize() as retokenizer:
            retokenizer.merge(merged[0:2], attrs={"ENT_TYPE": "LOC"})
        docs = [
            doc, *DocBin().from_bytes(stored).get_docs(nlp.vocab), doc[1:].as_doc(copy_user_data=True),
            Doc.from_docs([doc, doc]), doc[2:].as_doc(), merged,
        ]
        result = [[ent._.panx_score for ent in doc.ents] for doc in docs]
    """
    (first, second), *others = run(code)
    assert None not in (first, second)
    assert others == [[first, second], [second], [first, second] * 2, [None], [None, second]]


def test_it_does_not_unlearn_what_training_data_leaves_out(run):
    code = """
        from spacy.training import Example
        nlp = spacy.load("it_panx_xlmr")
        optimizer = nlp.resume_training()
        for _ in range(8):
            for annotation in ({"entities": ["-"]}, {"cats": {"news": 1.0}}):
                losses = nlp.update([Example.from_dict(nlp.make_doc("Bari"), annotation)], sgd=optimizer)
        result = [losses["ner"], [(ent.text, ent.label_) for ent in nlp("Bari").ents]]
    """
    assert run(code) == [0, [["Bari", "LOC"]]]


LISTENER = {"@architectures": "spacy-transformers.TransformerListener.v1", "grad_factor": 0.0, "upstream": "*"}
LISTENER |= {"pooling": {"@layers": "reduce_mean.v1"}}
TEXTCAT = {"@architectures": "spacy.TextCatReduce.v1", "exclusive_classes": True, "tok2vec": LISTENER}
TEXTCAT |= {f"use_reduce_{way}": way == "mean" for way in ("first", "last", "max", "mean")}


@pytest.mark.parametrize(("pipeline", "place"), [("loaded", ""), ("loaded", "before='doc_cleaner'"), ("sourced", "")])
def test_a_textcat_learns_and_predicts_from_the_shared_transformer(run, pipeline, place):
    code = f"""
        from spacy.training import Example
        from thinc.api import Adam
        nlp = loaded = spacy.load("it_panx_xlmr")
        if {pipeline!r} == "sourced":
            nlp = spacy.blank("it", vocab=loaded.vocab)
            for name in loaded.pipe_names:
                nlp.add_pipe(name, source=loaded)
        textcat = nlp.add_pipe("textcat", config={{"model": {TEXTCAT!r}}}, {place})
        gold = [("Bari è bella", "A"), ("hola amigos", "B")]
        examples = [
            Example.from_dict(nlp.make_doc(text), {{"cats": {{"A": label == "A", "B": label == "B"}}}})
            for text, label in gold
        ]
        textcat.initialize(lambda: examples, nlp=nlp)
        nlp.resume_training()
        optimizer = Adam(0.01)
        with nlp.select_pipes(enable=["transformer", "textcat"]):
            for _ in range(15):
                nlp.update(examples, sgd=optimizer)
        docs = [*nlp.pipe([text for text, _ in gold]), nlp(gold[0][0])]
        result = [max(doc.cats, key=doc.cats.get) for doc in docs], [round(doc.cats["A"], 2) for doc in docs]
    """
    best, (first, second, again) = run(code)
    assert best == ["A", "B", "A"]
    assert first == again
    assert first > 0.6 > 0.4 > second


def test_a_stream_holds_the_vectors_of_a_bounded_number_of_tokens(run):
    code = """
        import sys
        transformer, held, most = nlp.get_pipe("transformer"), 0, 0
        module = sys.modules[type(transformer).__module__]
        usual = module.MAX_TOKENS
        set_annotations = transformer.set_annotations
        def counting(docs, predictions):
            global held, most
            held += sum(map(len, docs))
            most = max(most, held)
            set_annotations(docs, predictions)
        transformer.set_annotations = counting
        module.MAX_TOKENS = 400
        for doc in nlp.pipe(["Bari " * 50] * 24):
            assert doc._.trf_data is None
            held -= len(doc)
        module.MAX_TOKENS = usual
        del transformer.set_annotations
        result = [usual, held, most]
    """
    assert run(code) == [8192, 0, 400]


def test_an_interactive_stream_is_not_read_ahead(run):
    code = """
        read = []
        def typed():
            for i in range(3):
                read.append(i)
                yield "Bari", i
        result = [list(read) for _ in nlp.pipe(typed(), as_tuples=True, batch_size=1)]
    """
    assert run(code) == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("product", ["training/config.cfg", "training/model-last", "training/model"])
def test_every_product_of_the_project_gives_an_optimizer(project, product):
    path = project / product
    if path.suffix:
        nlp = load_model_from_config(load_config(path), auto_fill=True)
    else:
        nlp = spacy.load(path)
        assert nlp.resume_training().learn_rate == pytest.approx(0.002)
    assert nlp.create_optimizer().learn_rate == pytest.approx(0.002)


def test_spacy_train_trains_the_installed_package_further_with_the_options_of_its_command_line(project, tmp_path):
    (wheel,) = (project / "packages").rglob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    config = load_config(project / "training" / "config.cfg")
    config["components"] = {name: {"source": "it_panx_xlmr"} for name in config["nlp"]["pipeline"]}
    config.to_disk(tmp_path / "config.cfg")
    command = ["spacy", "train", tmp_path / "config.cfg", "--code", "scripts/train.py", "--output", tmp_path]
    options = {"max_steps": 3, "eval_frequency": 1, "batcher.size": 30}  # two batches an epoch
    options |= {f"logger.{name}_file": tmp_path / name for name in ("output", "plot")}
    command += [f"--training.{name}={value}" for name, value in options.items()]
    installed = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, "-m", *command], cwd=project, env=installed, check=True, capture_output=True)
    assert [row["epoch"] for row in srsly.read_jsonl(tmp_path / "output")] == [1, 1, 2]
    assert [ent.text for ent in spacy.load(tmp_path / "model-last")("Bari").ents] == ["Bari"]


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


def test_spacy_evaluate_takes_it_by_name(project, process, tmp_path):
    corpus = project / "corpus" / "test.spacy"
    done = process("-m", "spacy", "evaluate", "it_panx_xlmr", corpus, "--gold-preproc", "--output", "m.json")
    assert done.returncode == 0, done.stderr
    test = srsly.read_json(project / "metrics" / "test.json")
    assert srsly.read_json(tmp_path / "m.json")["ents_f"] == test["ents_f"]
