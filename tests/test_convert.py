import json

import pytest
import spacy
import srsly
from spacy.tokens import DocBin

from benchmarks.known_answers import ANSWERS
from conftest import ROOT, SAMPLE
from scripts import convert
from scripts import running as running_script
from scripts.convert import FILE_NAMES, make_doc, make_training_doc, repair
from scripts.evaluate import iob2
from scripts.panx import SPLITS, Sentence, read_tsv
from scripts.pipeline import blank_pipeline
from scripts.running import agreement, count, load, make_docs


@pytest.fixture
def data(tmp_path):
    """A folder with three splits that can be converted."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.tsv").write_text("Anna\tB-PER\nNeri\tI-PER\n(\tO\nBari\tB-LOC\n)\tO\n", encoding="utf8")
    return folder


def read_docs(path):
    return list(DocBin().from_disk(path).get_docs(spacy.blank("it").vocab))


def check_round_trip(folder, output, lang_suffix=""):
    for split in SPLITS:
        sentences, docs = read_tsv(folder / f"{split}{lang_suffix}.tsv"), read_docs(output / FILE_NAMES[split])
        assert not any(doc.has_unknown_spaces for doc in docs)
        if split == "train":  # quotes and elisions are cut off its words
            assert ["".join(t.text for t in doc) for doc in docs] == ["".join(s.words) for s in sentences]
        else:
            assert [tuple(t.text for t in doc) for doc in docs] == [s.words for s in sentences]
            assert [tuple(iob2(doc)) for doc in docs] == [s.tags for s in sentences]


def test_tokens_and_tags_of_the_sample_survive(tmp_path):
    convert.main(SAMPLE, tmp_path)
    check_round_trip(SAMPLE, tmp_path)


def test_tokens_and_tags_of_all_40000_sentences_survive(tmp_path, panx_dir):
    stats = convert.main(panx_dir, tmp_path)
    check_round_trip(panx_dir, tmp_path, "-it")
    assert stats["train"]["entities"] == {"LOC": 9852, "ORG": 8045, "PER": 9766}
    assert stats["train"]["duplicate_sentences"] > 1000
    assert stats["shared"]["validation also in train"] == 1205
    assert stats["shared"]["test also in train"] == 1163


def test_further_training_sentences_are_added_without_those_of_the_other_splits(data, tmp_path):
    extra = tmp_path / "extra"
    extra.mkdir()
    (data / "validation.tsv").write_text("altro\tO\n", encoding="utf8")
    known = "Anna\tO\nNeri\tO\n(\tO\nBari\tO\n)\tO\n\naltro\tB-LOC\n"  # whatever its tags
    for name in ("PAN-X.es", "PAN-X.fr"):
        (extra / f"{name}.tsv").write_text(f"{name}\tB-LOC\n\nuno\tO\n\n{known}\ndos\tO\n", encoding="utf8")
    stats = convert.main(data, tmp_path, extra_train=extra)
    assert [stats[split]["sentences"] for split in SPLITS] == [7, 1, 1]
    texts = [doc.text for doc in read_docs(tmp_path / "train.spacy")]
    assert texts == ["Anna Neri (Bari)", "PAN-X.es", "uno", "dos", "PAN-X.fr", "uno", "dos"]
    stats = convert.main(data, tmp_path, train_size=1, extra_train=extra)
    assert stats["train"]["sentences"] == 3
    for size, expected in ((2, 5), (400, 7)):  # all that is there is taken
        stats = convert.main(data, tmp_path, extra_train=extra, extra_train_size=size)
        assert stats["train"]["sentences"] == expected


@pytest.mark.parametrize(
    ("words", "tags", "cut", "cut_tags"),
    [
        (["''Strada", "di"], ["O", "O"], ["''", "Strada", "di"], ["O", "O", "O"]),
        (["di", "''Lost", "''"], ["B-ORG", "I-ORG", "O"], ["di", "''", "Lost", "''"], ["B-ORG", "I-ORG", "I-ORG", "O"]),
        (["''Lost", "''"], ["B-ORG", "O"], ["''", "Lost", "''"], ["O", "B-ORG", "O"]),
        (["dell'Italia", "oggi"], ["B-LOC", "O"], ["dell'", "Italia", "oggi"], ["O", "B-LOC", "O"]),
        (["dell'Italia", "oggi"], ["O", "O"], ["dell'", "Italia", "oggi"], ["O", "", "O"]),
        (["l'acqua"], ["O"], ["l'", "acqua"], ["O", "O"]),
        (["Banca", "d'Italia"], ["B-ORG", "I-ORG"], ["Banca", "d'", "Italia"], ["B-ORG", "I-ORG", "I-ORG"]),
        (["L'Aquila"], ["B-LOC"], ["L'", "Aquila"], ["B-LOC", "I-LOC"]),
        (["D’Annunzio"], ["B-PER"], ["D’", "Annunzio"], ["B-PER", "I-PER"]),
        (["dell'Italia unita"], ["O"], ["dell'", "Italia unita"], ["O", ""]),
        (["po'", "6-4"], ["O", "O"], ["po'", "6-4"], ["O", "O"]),
    ],
)
def test_training_words_are_cut_where_a_text_is_cut(words, tags, cut, cut_tags):
    doc = make_training_doc(blank_pipeline("it"), Sentence(tuple(words), tuple(tags)))
    assert [token.text for token in doc] == cut
    assert [
        token.ent_iob_ and (f"{token.ent_iob_}-{token.ent_type_}" if token.ent_type_ else "O") for token in doc
    ] == cut_tags
    assert doc.text == make_doc(doc.vocab, Sentence(tuple(words), tuple(tags))).text


@pytest.fixture
def running(tmp_path):
    """Ten documents: the ninth is for validation and the tenth for testing."""
    folder = tmp_path / "running"
    folder.mkdir()
    documents = [f"Il treno è in ritardo.\nParte [PER Ugo {i}] dall'[LOC Italia]." for i in range(9)]
    documents.append("\n".join(f"Riga {i}, dell'[ORG Eni]." for i in range(6)))
    (folder / "a.txt").write_text("\n\n".join(documents), encoding="utf8")
    return folder


def test_the_running_corpus_is_added_as_often_as_asked(data, tmp_path, running):
    stats = convert.main(data, tmp_path, running=running, running_times=3)
    train = read_docs(tmp_path / "train.spacy")
    assert len(train) == 1 + 3 * 16
    assert [(e.text, e.label_) for e in train[2].ents] == [("Ugo 0", "PER"), ("Italia", "LOC")]
    assert len(read_docs(tmp_path / "running-dev.spacy")) == 2
    (paragraph,) = read_docs(tmp_path / "running-test.spacy")
    assert len(paragraph.ents) == 6
    assert stats["running"]["train"]["sentences"] == 16
    convert.main(data, tmp_path)
    assert read_docs(tmp_path / "running-dev.spacy") == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Vive a [LOK Bari].", "a.txt, line 2: unexpected bracket at '[LOK Bari].'"),
        ("Vive a [LOC Ba]ri.", "a.txt, line 2: 'Ba' begins or ends inside a token"),
    ],
)
def test_a_bracket_that_is_no_entity_is_refused_with_its_line_and_so_is_too_small_a_corpus(
    refused, running, line, expected
):
    (running / "a.txt").write_text(f"Piove.\n{line}\n" + "\nNevica.\n" * 9, encoding="utf8")
    assert expected in refused(running_script, running)
    (running / "a.txt").write_text("Piove.\n", encoding="utf8")
    assert "documents in its .txt files: 1, expected at least ten" in refused(running_script, running)
    assert not (running / "stats.json").exists()


def test_the_projects_running_corpus_is_what_its_stats_say(tmp_path):
    folder = ROOT / "corpus" / "running"
    stats = count(folder)
    assert stats == json.loads((folder / "stats.json").read_text())
    assert stats["all"]["sentences"] >= 4000
    assert stats["all"]["without_entity"] >= 0.4
    assert stats["test_names_not_in_train"] >= 0.6
    assert agreement(folder, folder / "second" / "test.txt") >= 0.95
    nlp = blank_pipeline("it")
    for documents in load(folder).values():
        make_docs(nlp, documents)


def test_no_sentence_of_the_sample_and_of_the_known_answers_is_copied_from_panx(sample, panx_dir):
    panx = {" ".join(s.words).replace(" ", "") for split in sample for s in read_tsv(panx_dir / f"{split}-it.tsv")}
    ours = [" ".join(s.words) for sentences in sample.values() for s in sentences]
    ours += [row["text"] for row in srsly.read_jsonl(ANSWERS)]
    assert [text for text in ours if text.replace(" ", "") in panx] == []


BLANK, INSIDE = "blank token dropped", "I- without its B- made a B-"


@pytest.mark.parametrize(
    ("words", "tags", "kept", "repaired", "repairs"),
    [
        ("Anna, ,,\u3000,Neri", "B-PER,O,O,O,O", "Anna,Neri", "B-PER,O", {BLANK: 3}),
        ("Anna,Neri", "I-PER,I-PER", "Anna,Neri", "B-PER,I-PER", {INSIDE: 1}),
        ("Anna,Bari", "B-PER,I-LOC", "Anna,Bari", "B-PER,B-LOC", {INSIDE: 1}),
        (" ,Neri", "B-PER,I-PER", "Neri", "B-PER", {BLANK: 1, INSIDE: 1}),
    ],
)
def test_blank_tokens_are_dropped_and_what_continues_no_entity_begins_one(words, tags, kept, repaired, repairs):
    before, after = (Sentence(tuple(w.split(",")), tuple(t.split(","))) for w, t in ((words, tags), (kept, repaired)))
    assert repair(before) == (after, repairs)


def test_stats_count_what_is_there(data, tmp_path):
    (data / "test.tsv").write_text("Bari\tI-LOC\n\tO\n\nBari\tB-LOC\n\n \tO\n", encoding="utf8")
    stats = convert.main(data, tmp_path)
    assert stats == srsly.read_json(tmp_path / "stats.json")
    test = stats["test"]
    assert (test["sentences"], test["tokens"], test["duplicate_sentences"]) == (2, 2, 1)
    assert test["entities"] == {"LOC": 2}
    assert test["repairs"] == {INSIDE: 1, BLANK: 2, "sentence without tokens dropped": 1}
    assert stats["shared"]["validation also in train"] == 1


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (lambda data: (data / "test.tsv").write_bytes(b" \tO\n"), [], "every token of the split is blank"),
        (lambda data: None, ["--train-size", 2], "1 sentences, 2 asked for"),
        (lambda data: None, ["--train-size", -1], "1 sentences, -1 asked for"),
    ],
)
def test_bad_data_is_one_sentence_and_leaves_nothing(refused, data, tmp_path, change, options, expected):
    change(data)
    assert expected in refused(convert, data, tmp_path / "corpus", *options)
    assert not list((tmp_path / "corpus").glob("*"))
