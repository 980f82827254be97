"""The sentences of `make known-answers`, which compares the demo's package with the accepted entities."""

import spacy
import srsly

from known_answers import compare
from scripts.convert import make_doc
from scripts.panx import read_tsv

SENTENCES = [row["text"] for row in srsly.read_jsonl(compare.ANSWERS)]


def test_there_are_200_sentences():
    assert len(SENTENCES) == len(set(SENTENCES)) == 200


def test_no_sentence_is_copied_from_panx(panx_dir):
    vocab = spacy.blank("it").vocab
    splits = [read_tsv(panx_dir / f"{split}-it.tsv") for split in ("train", "validation", "test")]
    assert not {make_doc(vocab, sentence).text for split in splits for sentence in split} & set(SENTENCES)
