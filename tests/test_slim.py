import numpy
import pytest
import sentencepiece
import spacy
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.tokens import Doc, DocBin
from transformers import BertConfig, BertModel, BertTokenizerFast

import slim as slim_script
from errors import UserError
from test_encoder import pipeline, vectors

KEPT = ["Anna vive a Bari.", "La Banca d'Italia"]


@pytest.fixture(scope="module")
def whole(tiny_encoder):
    return pipeline(tiny_encoder)


@pytest.fixture(scope="module")
def trimmed(tiny_encoder):
    """The pipeline with the wordpieces of two texts only, and the ids that they had before."""
    nlp = pipeline(tiny_encoder)
    model = nlp.get_pipe("transformer").model
    kept = slim_script.needed_ids(model.tokenizer, KEPT)
    slim_script.trim(model, kept)
    return nlp, kept


def pieces(nlp, text):
    return nlp.get_pipe("transformer").model.tokenizer.tokenize(text)


def test_a_text_of_kept_wordpieces_has_the_same_vectors(whole, trimmed):
    nlp, kept = trimmed
    assert len(kept) < len(whole.get_pipe("transformer").model.tokenizer) / 2
    for before, after in zip(vectors(whole, KEPT), vectors(nlp, KEPT), strict=True):
        assert numpy.array_equal(before, after)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_text_is_cut_as_before_or_into_smaller_pieces_without_losing_a_character(whole, trimmed, text):
    nlp, kept = trimmed
    before, after = pieces(whole, text), pieces(nlp, text)
    names = whole.get_pipe("transformer").model.tokenizer.convert_ids_to_tokens(kept)
    if set(before) <= set(names):
        assert after == before
    assert "".join(after) == "".join(before)
    assert len(after) >= len(before)


def test_the_sentencepiece_file_has_the_tokenizers_pieces(trimmed):
    nlp, kept = trimmed
    objects = nlp.get_pipe("transformer").model.layers[0].shims[0]._hfmodel
    processor = sentencepiece.SentencePieceProcessor(model_proto=objects.vocab_file_contents)
    ordinary = [p for p in objects.tokenizer.get_vocab() if p not in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")]
    in_file = {processor.id_to_piece(i) for i in range(3, processor.get_piece_size())}
    assert in_file == set(ordinary)
    assert objects.transformer.config.vocab_size == len(objects.tokenizer) == len(kept)


def test_special_tokens_keep_their_meaning(trimmed):
    tokenizer = trimmed[0].get_pipe("transformer").model.tokenizer
    ids = tokenizer("Bari")["input_ids"]
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["<s>", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.mask_token_id) == "<mask>"


def test_what_was_made_slim_is_the_same_after_saving_and_loading(trimmed, tmp_path):
    nlp, _ = trimmed
    slim_script.halve(nlp.get_pipe("transformer").model)
    nlp.to_disk(tmp_path)
    loaded = spacy.load(tmp_path)
    text = "Né Anna né il 7º Ufficio ☂"
    assert pieces(loaded, text) == pieces(nlp, text)
    assert numpy.array_equal(vectors(loaded, [text])[0], vectors(nlp, [text])[0])


def test_weights_too_large_for_16_bits_are_refused(tiny_encoder):
    model = pipeline(tiny_encoder).get_pipe("transformer").model
    next(model.transformer.parameters()).data[5, 5] = 1e6
    with pytest.raises(UserError, match="do not fit into 16 bits.*--vars.slim false"):
        slim_script.halve(model)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bari", "##a"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    model = pipeline(tmp_path).get_pipe("transformer").model
    with pytest.raises(UserError, match="WordPiece model, expected Unigram"):
        slim_script.trim(model, [0, 1, 2, 3, 4])


def run(*arguments):
    app = typer.Typer()
    app.command()(slim_script.main)
    return typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("make_slim", ["true", "False"])
def test_the_command_makes_a_pipeline_that_finds_the_same(whole, tmp_path, make_slim):
    whole.to_disk(tmp_path / "model-last")
    docs = [Doc(whole.vocab, words=text.split()) for text in KEPT]
    DocBin(docs=docs).to_disk(tmp_path / "train.spacy")
    options = ["--corpus", tmp_path / "train.spacy", "--lang", "it", "--words", 100]
    result = run(tmp_path / "model-last", tmp_path / "model", make_slim, *options)
    assert result.exit_code == 0, result.output
    before, after = ((tmp_path / name / "transformer" / "model").stat().st_size for name in ("model-last", "model"))
    assert after < 0.8 * before if make_slim == "true" else after == before
    assert len(spacy.load(tmp_path / "model")(KEPT[0])) == 5


def test_a_language_without_word_list_keeps_what_the_training_sentences_need(capsys):
    assert slim_script.frequent_words("xx", 10) == []
    assert "xx" in capsys.readouterr().out


def test_the_most_frequent_words_come_in_lower_case_and_with_a_capital():
    words = slim_script.frequent_words("it", 10)
    assert {"che", "Che"} <= set(words)
    assert len(words) == 20


def test_all_parameters_are_on_16_bit_values_after_halving(tiny_encoder):
    model = pipeline(tiny_encoder).get_pipe("transformer").model
    slim_script.halve(model)
    assert all(torch.equal(p.data, p.data.half().float()) for p in model.transformer.parameters())
