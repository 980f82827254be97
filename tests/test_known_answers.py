"""The comparison itself, with a pipeline of rules; `make known-answers` compares the demo's package."""

import pytest
import spacy
import srsly

from conftest import invoke
from known_answers import compare
from scripts.convert import make_doc
from scripts.panx import read_tsv

SENTENCES = [row["text"] for row in srsly.read_jsonl(compare.ANSWERS)]
NAMES = {"Bari": "LOC", "Roma": "LOC", "Anna": "PER"}


@pytest.fixture
def run(tmp_path):
    """Run the command in a new folder, with a pipeline that knows the given names."""
    answers = tmp_path / "answers.jsonl"
    srsly.write_jsonl(answers, [{"text": text, "ents": []} for text in ("Bari e Roma.", "Anna è a Bari.")])

    def call(names, *options):
        nlp = spacy.blank("it")
        patterns = [{"label": label, "pattern": name} for name, label in names.items()]
        nlp.add_pipe("entity_ruler").add_patterns(patterns)
        nlp.to_disk(tmp_path / "pipeline")
        result = invoke(compare.main, tmp_path / "pipeline", "--answers", answers, *options)
        return result.exit_code, " ".join(result.output.split())

    return call


def test_the_same_entities_pass(run):
    code, output = run(NAMES, "--accept")
    assert (code, "4 entities in 2 sentences" in output) == (0, True)
    assert run(NAMES)[0] == 0


def test_a_change_fails_and_names_the_sentence_and_what_is_gone_and_new(run, tmp_path):
    run(NAMES, "--accept")
    before = (tmp_path / "answers.jsonl").read_bytes()
    code, output = run(NAMES | {"Anna": "ORG"})
    assert code == 1
    assert "sentence 2: Anna è a Bari. + ORG 'Anna' (0-4) - PER 'Anna' (0-4)" in output
    assert "sentence 1" not in output
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_a_broken_answers_file_is_refused_in_a_sentence(run, tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"text": 3}\n', encoding="utf8")
    code, output = run(NAMES)
    assert (code, "restore the file from git" in output) == (1, True)


def test_there_are_200_sentences():
    assert len(SENTENCES) == len(set(SENTENCES)) == 200


def test_no_sentence_is_copied_from_panx(panx_dir):
    vocab = spacy.blank("it").vocab
    splits = [read_tsv(panx_dir / f"{split}-it.tsv") for split in ("train", "validation", "test")]
    assert not {make_doc(vocab, sentence).text for split in splits for sentence in split} & set(SENTENCES)
