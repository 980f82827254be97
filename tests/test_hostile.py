"""No text crashes or hangs the pipeline, the annotator or the converter, and each entity is where its text is.

The pipeline has random weights, so that it finds entities everywhere.

HYPOTHESIS_PROFILE=long runs the same properties over many more examples.
"""

import contextlib
import csv
import json
import sys
import tempfile
import unicodedata
from functools import partial
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import spacy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from spacy.tokens import Doc

from scripts.annotate.units import READERS
from scripts.common import UserError
from scripts.convert import convert_split, make_doc, repair
from scripts.evaluate import entities_of, iob2
from scripts.panx import TAGS, Sentence, read_tsv, to_tsv
from scripts.pipeline.tokenizer import SURROGATE
from test_annotate import annotate_file
from test_encoder import pipeline

SPACES = "".join(chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace())
# what some program somewhere trips over
PARTS = [
    *'\0\ud800\udfff\u0301\u200b\u200d\u200e\u202a\u202e\u202c\u2066\u2069\ufeff\ufffd\uffff\U0010ffff\xadﬁİß▁«»"().-',
    *("e\u0301", "\u0915\u094d\u0937", "\ud83d\ude00", "\x1b[31m", "👩‍👩‍👧", "🇮🇹", "東京", "القاهرة", "\r\n", "\n\n"),
    *("<s>", "</s>", "<mask>", "http://a.it/?x=1", "a@b.it", "{}", "%s", "dell'", "Italia", "Bari", "po'", "''", "..."),
    *SPACES,
]
characters = st.characters(exclude_categories=())  # surrogates too
texts = st.one_of(
    st.text(characters, max_size=80),
    st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from([1, 1, 1, 2, 130])), max_size=12).map(
        lambda parts: "".join(part * times for part, times in parts)
    ),
    st.lists(st.sampled_from(PARTS) | st.text(characters, max_size=5), max_size=30).map("".join),
)


@pytest.fixture(scope="module")
def nlp(tiny_encoder):
    """A pipeline whose weights are random, those of the tags too: it finds an entity of any kind in almost any text."""
    nlp = pipeline(tiny_encoder)
    output = nlp.get_pipe("ner").model.get_ref("output_layer")
    output.set_param("W", numpy.random.default_rng(0).normal(size=output.get_param("W").shape).astype("float32"))
    assert nlp("Anna vive a Bari.").ents
    return nlp


def check(doc: Doc, text: str) -> None:
    """Assert that the Doc has the text, and that its entities are inside it and do not overlap."""
    kept = doc.text
    assert kept == SURROGATE.sub("\ufffd", text)
    assert len(kept) == len(text)
    end = 0
    for ent in doc.ents:
        assert end <= ent.start_char < ent.end_char <= len(text)
        end = ent.end_char
        assert kept[ent.start_char : ent.end_char] == ent.text == ent.text.strip()
        assert ent.label_ in {"LOC", "PER"}
        assert 0 <= ent._.panx_score <= 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(texts, max_size=5), st.integers(1, 5))
@example(["a\ud800b"], 1)
def test_entities_of_any_text_are_inside_it_and_apart_and_a_stream_gives_the_same(nlp, some, batch_size):
    docs = list(nlp.pipe(some, batch_size=batch_size))
    assert len(docs) == len(some)
    for doc, text in zip(docs, some, strict=True):
        check(doc, text)
        alone = nlp(text)
        assert entities_of(doc) == entities_of(alone)
        assert [ent._.panx_score for ent in doc.ents] == pytest.approx(
            [ent._.panx_score for ent in alone.ents], abs=1e-4
        )


NAMED = {
    "nothing": "",
    "nothing but a zero-width space": "\u200b",
    "only surrogates": "\ud800" * 300,
    "combining marks": unicodedata.normalize("NFD", "Però Mondovì è più giù") + "\u0301" * 50,
    "every Unicode space, alone": SPACES,
    "every Unicode space, between words": "Bari".join(SPACES),
    "control characters": "".join(map(chr, range(32))) + "Bari" + "".join(map(chr, range(127, 160))),
    "special tokens": "<s> Bari </s> <mask> <pad> <unk>",
    "characters that normalizing makes longer": "ﷺ ﷽ ﬃ ㎢ ½" * 20,
    "only punctuation": "«»“”''...!?" * 50,
    "one character of each plane": "".join(chr(plane << 16 | 0x1234) for plane in range(17)),
    **{f"100,000 times {part!r}": part * 100_000 for part in ("x", "'", "\u0301", "\n")},
}


@pytest.mark.parametrize("name", NAMED)
def test_a_text_of_this_kind_passes(nlp, name):
    check(nlp(NAMED[name]), NAMED[name])


# ---- The annotator


def write_rows(path, rows):
    """The rows in the file's format, in the column `text`. Gives the rows as the file has them: Parquet has no lone
    surrogates, and in JSON two of them can be one character.
    """
    if path.suffix == ".parquet":
        rows = [SURROGATE.sub("\ufffd", row) if row else row for row in rows]
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}), path)
    elif path.suffix == ".csv":
        rows = [row or "" for row in rows]  # CSV has no null
        with path.open("w", newline="", encoding="utf8", errors="surrogatepass") as file:
            csv.writer(file).writerows([["text"], *([row] for row in rows)])
    else:
        lines = [json.dumps({"text": row}) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
        rows = [json.loads(line)["text"] for line in lines]
    return rows


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(texts | st.none(), min_size=1, max_size=8), st.sampled_from([*READERS]), st.integers(1, 4))
@example(["\ud800\udc00"], ".jsonl", 1)
def test_the_annotator_writes_each_row_once_or_says_what_is_wrong_with_it(nlp, rows, suffix, unit_rows):
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name) / f"hostile{suffix}", Path(name) / "annotated"
        rows = write_rows(source, rows)
        written, bad = annotate_file(nlp, source, output, max_chars=5_000, unit_rows=unit_rows)
    refused = {i for i, row in enumerate(rows) if row is None or len(row) > 5_000 or SURROGATE.search(row)}
    assert {row for _, row in bad} == refused
    assert {row for _, row in written} == set(range(len(rows))) - refused
    for (_, row), (text, entities) in written.items():
        assert text == rows[row]
        end = 0
        for first, last, *_ in entities:
            assert end <= first < last <= len(text)
            end = last


# ---- The converter

VOCAB = spacy.blank("it").vocab
words = st.one_of(st.text(characters, max_size=6), st.sampled_from(PARTS))
words = words.filter(lambda word: not any(c in word for c in "\t\n\r") and not SURROGATE.search(word))
# sentences with tags that need not be IOB2
tagged = st.lists(st.tuples(words, st.sampled_from(TAGS)), min_size=1, max_size=8)
lines = tagged.map(lambda pairs: Sentence(*map(tuple, zip(*pairs, strict=True))))


@given(st.lists(lines, min_size=1, max_size=4))
def test_sentences_survive_the_way_to_a_file_and_back(tmp_path_factory, some):
    path = tmp_path_factory.getbasetemp() / "hostile.tsv"
    data = to_tsv(some)
    path.write_bytes(data)
    if data.startswith(b"\xef\xbb\xbf"):  # a reader takes it for the file's byte order mark
        return
    assert read_tsv(path) == some


@given(st.lists(lines, min_size=1, max_size=4))
def test_tokens_and_tags_of_any_sentence_survive_the_conversion(some):
    with contextlib.suppress(UserError):  # every token of all of them is blank
        docs, _ = convert_split(some, "hostile", partial(make_doc, VOCAB))
        kept = [whole for whole, _ in map(repair, some) if whole.words]
        for doc, whole in zip(docs, kept, strict=True):
            assert tuple(token.text for token in doc) == whole.words
            assert tuple(iob2(doc)) == whole.tags
