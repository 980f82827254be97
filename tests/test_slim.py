import pickle
import shutil

import numpy
import pytest
import sentencepiece
import spacy
import srsly
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.tokens import Doc, DocBin
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from scripts import slim as slim_script
from scripts.common import UserError
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
    kept = slim_script.needed_ids(model.tokenizer, KEPT, [], 1)
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


@pytest.mark.parametrize(("bits", "share"), [(8, 0.29), (16, 0.53)])
def test_rounded_weights_are_stored_in_their_bits_and_loaded_as_they_were(trimmed, tmp_path, bits, share):
    nlp, _ = trimmed
    nlp = pickle.loads(pickle.dumps(nlp))
    model = nlp.get_pipe("transformer").model
    slim_script.round_weights(model, bits)
    nlp.to_disk(tmp_path)
    loaded = spacy.load(tmp_path)
    text = "Né Anna né il 7º Ufficio ☂"
    assert pieces(loaded, text) == pieces(nlp, text)
    assert numpy.array_equal(vectors(loaded, [text])[0], vectors(nlp, [text])[0])
    message = srsly.msgpack_loads(model.layers[0].shims[0].to_bytes())
    assert len(message["state"]) < share * 4 * sum(p.numel() for p in model.transformer.parameters())


def test_weights_in_8_bits_are_off_by_less_than_half_a_step_of_their_row(tiny_encoder):
    model = pipeline(tiny_encoder).get_pipe("transformer").model
    before = {name: parameter.data.clone() for name, parameter in model.transformer.named_parameters()}
    slim_script.round_weights(model, 8)
    for name, parameter in model.transformer.named_parameters():
        if parameter.dim() == 2:
            steps = before[name].abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-15)
            assert ((parameter.data - before[name]).abs() <= steps / 2 * (1 + 1e-6)).all(), name


def test_weights_too_large_for_16_bits_are_refused(tiny_encoder):
    model = pipeline(tiny_encoder).get_pipe("transformer").model
    next(model.transformer.parameters()).data[5, 5] = 1e6
    with pytest.raises(UserError, match="do not fit into 16 bits.*--vars.slim false"):
        slim_script.round_weights(model, 16)


def test_another_number_of_bits_is_refused(whole):
    with pytest.raises(UserError, match="4 bits, expected 8 or 16"):
        slim_script.round_weights(whole.get_pipe("transformer").model, 4)


def test_further_wordpieces_are_the_most_probable_in_the_sentences_script(whole):
    tokenizer = whole.get_pipe("transformer").model.tokenizer
    few, more = (slim_script.needed_ids(tokenizer, KEPT, [], pieces) for pieces in (1, 400))
    added = tokenizer.convert_ids_to_tokens(sorted(set(more) - set(few)))
    assert len(more) == 400 and set(few) < set(more)
    assert set(slim_script.scripts("".join(added))) == {"LATIN"}
    left = set(range(max(set(more) - set(few)))) - set(more)
    assert all(set(slim_script.scripts(tokenizer.convert_ids_to_tokens(i))) - {"LATIN"} for i in left)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bari", "##a"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    model = pipeline(tmp_path).get_pipe("transformer").model
    with pytest.raises(UserError, match="WordPiece model, expected Unigram"):
        slim_script.trim(model, [0, 1, 2, 3, 4])


def test_a_tokenizer_with_a_token_beside_its_wordpieces_is_refused(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[NOTE]"])
    tokenizer.save_pretrained(folder)
    model = pipeline(folder).get_pipe("transformer").model
    with pytest.raises(UserError, match="not among its wordpieces"):
        slim_script.trim(model, slim_script.needed_ids(model.tokenizer, KEPT, [], 300))


def run(*arguments):
    app = typer.Typer()
    app.command()(slim_script.main)
    return typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("make_slim", ["true", "False"])
def test_the_command_makes_a_pipeline_that_finds_the_same(whole, tmp_path, make_slim):
    whole.to_disk(tmp_path / "model-last")
    docs = [Doc(whole.vocab, words=text.split()) for text in KEPT]
    DocBin(docs=docs).to_disk(tmp_path / "train.spacy")
    (tmp_path / "train-it.tsv").write_text("Anna\tB-PER\n\n \tO\n")
    options = ["--data", tmp_path, "--corpus", tmp_path / "train.spacy", "--lang", "it", "--pieces", 300, "--bits", 8]
    result = run(tmp_path / "model-last", tmp_path / "model", make_slim, *options)
    assert result.exit_code == 0, result.output
    before, after = ((tmp_path / name / "transformer" / "model").stat().st_size for name in ("model-last", "model"))
    assert after < 0.8 * before if make_slim == "true" else after == before
    assert len(spacy.load(tmp_path / "model")(KEPT[0])) == 5


def test_wordpieces_of_sentences_that_were_not_trained_on_are_kept_too(tmp_path):
    (tmp_path / "train-it.tsv").write_text("dell'\tO\nEtna\tB-LOC\n\nBari\tB-LOC\n")
    DocBin(docs=[Doc(spacy.blank("it").vocab, words=["Anna"], spaces=[False])]).to_disk(tmp_path / "train.spacy")
    texts = slim_script.training_texts(tmp_path, tmp_path / "train.spacy", "it")
    assert texts == ["dell' Etna", "Bari", "Anna"]


def test_a_language_without_word_list_keeps_what_the_training_sentences_need(capsys):
    assert slim_script.frequent_words("xx") == []
    assert "xx" in capsys.readouterr().out


def test_the_most_frequent_words_come_in_lower_case_and_with_a_capital():
    words = slim_script.frequent_words("it")
    assert {"che", "Che"} <= set(words)
