"""What slimming keeps of a pipeline, what it stores, and what it refuses."""

import pickle
import shutil

import numpy
import pytest
import spacy
import srsly
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.tokens import Doc, DocBin
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast, PreTrainedTokenizerFast

from scripts import slim as slim_script
from scripts.common import UserError
from test_encoder import pipeline, vectors

KEPT = ["Anna vive a Bari.", "La Banca d'Italia"]


def layer(nlp):
    return nlp.get_pipe("transformer").model


def pieces(nlp, text):
    return layer(nlp).tokenizer.tokenize(text)


@pytest.fixture(scope="module")
def whole(tiny_encoder):
    return pipeline(tiny_encoder)


@pytest.fixture(scope="module")
def pruned(tiny_encoder):
    """The pipeline with the wordpieces of two texts only, and the names of these wordpieces."""
    nlp = pipeline(tiny_encoder)
    tokenizer = layer(nlp).tokenizer
    kept = slim_script.needed_ids(tokenizer, KEPT, [], 1)
    slim_script.prune(layer(nlp), kept)
    return nlp, tokenizer.convert_ids_to_tokens(kept)


def test_a_text_of_kept_wordpieces_has_the_same_vectors(whole, pruned):
    nlp, names = pruned
    assert len(names) < len(layer(whole).tokenizer) / 2
    texts = [*KEPT, *(text.upper() for text in KEPT)]
    for before, after in zip(vectors(whole, texts), vectors(nlp, texts), strict=True):
        assert numpy.array_equal(before, after)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(st.sampled_from(" ".join(KEPT).split()), max_size=6).map(" ".join))
def test_every_text_is_cut_as_before_or_into_smaller_pieces_without_losing_a_character(whole, pruned, text):
    nlp, names = pruned
    before, after = pieces(whole, text), pieces(nlp, text)
    if set(before) <= set(names):
        assert after == before
    assert "".join(after) == "".join(before)
    assert len(after) >= len(before)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.29), (16, 0.53)])
def test_a_slim_pipeline_is_stored_in_its_bits_and_loaded_as_it_was(pruned, tmp_path, bits, share):
    nlp = pickle.loads(pickle.dumps(pruned[0]))
    slim_script.round_weights(layer(nlp), bits)
    nlp.to_disk(tmp_path)
    loaded = spacy.load(tmp_path)
    text = "Né Anna né il 7º Ufficio ☂"
    assert pieces(loaded, text) == pieces(nlp, text)
    assert numpy.array_equal(vectors(loaded, [text])[0], vectors(nlp, [text])[0])
    stored = srsly.msgpack_loads(layer(nlp).layers[0].shims[0].to_bytes())["state"]
    assert len(stored) < share * 4 * sum(parameter.numel() for parameter in layer(nlp).transformer.parameters())


def test_weights_in_8_bits_are_off_by_less_than_half_a_step_of_their_row(tiny_encoder):
    model = layer(pipeline(tiny_encoder))
    before = {name: parameter.data.clone() for name, parameter in model.transformer.named_parameters()}
    slim_script.round_weights(model, 8)
    for name, parameter in model.transformer.named_parameters():
        if parameter.dim() == 2:
            steps = before[name].abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-15)
            assert ((parameter.data - before[name]).abs() <= steps / 2 * (1 + 1e-6)).all(), name


def test_weights_too_large_for_16_bits_and_another_number_of_bits_are_refused(tiny_encoder):
    model = layer(pipeline(tiny_encoder))
    next(model.transformer.parameters()).data[5, 5] = 1e6
    with pytest.raises(UserError, match="do not fit into 16 bits.*--vars.slim false"):
        slim_script.round_weights(model, 16)
    with pytest.raises(UserError, match="slim_bits is 4, expected 8 or 16"):
        slim_script.round_weights(model, 4)


@pytest.mark.parametrize(
    ("pieces", "size", "kept"),
    [
        # the most probable ones in the sentences' script
        (["день", "mare", "λόγος", "sole", "12", "mese", "è"], 5, ["mare", "sole", "12", "è"]),
        # sentences in capitals
        (["mare", "sole", "MARE"], 1, ["mare", "MARE"]),
    ],
)
def test_further_wordpieces_are_the_most_probable_and_those_of_capitals(pieces, size, kept):
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(["<unk>", *pieces])], unk_id=0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>")
    ids = slim_script.needed_ids(tokenizer, ["mare"], [], size)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<unk>", *kept]


def test_special_tokens_keep_their_meaning_wherever_they_are_in_the_vocabulary():
    tokenizer = Tokenizer(models.Unigram([("b", -1.0), ("<unk>", 0.0), ("a", -1.0), ("<s>", 0.0)], unk_id=1))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    description = slim_script.pruned_description(srsly.json_loads(tokenizer.to_str()), [1, 2, 3])
    assert Tokenizer.from_str(srsly.json_dumps(description)).encode("ab").tokens == ["<s>", "a", "b"]
    assert Tokenizer.from_str(srsly.json_dumps(description)).encode("ab").ids == [2, 1, 0]


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bari", "##a"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="WordPiece model, expected Unigram"):
        slim_script.prune(layer(pipeline(tmp_path)), [0, 1, 2, 3, 4])


def test_a_tokenizer_with_a_token_beside_its_wordpieces_is_refused(tiny_encoder, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[NOTE]"])
    tokenizer.save_pretrained(folder)
    model = layer(pipeline(folder))
    with pytest.raises(UserError, match="not among its wordpieces"):
        slim_script.prune(model, slim_script.needed_ids(model.tokenizer, KEPT, [], 300))


def test_wordpieces_of_sentences_that_were_not_trained_on_are_kept_too(tmp_path):
    (tmp_path / "train-it.tsv").write_text("dell'\tO\nEtna\tB-LOC\n\n \tO\n\nBari\tB-LOC\n")
    DocBin(docs=[Doc(spacy.blank("it").vocab, words=["Anna"], spaces=[False])]).to_disk(tmp_path / "train.spacy")
    texts = slim_script.training_texts(tmp_path, tmp_path / "train.spacy", "it")
    assert texts == ["dell' Etna", "Bari", "Anna"]


def test_the_most_frequent_words_come_in_three_cases_and_an_unknown_language_has_none(capsys):
    assert {"che", "Che", "CHE"} <= set(slim_script.frequent_words("it"))
    assert slim_script.frequent_words("xx") == []
    assert "xx" in capsys.readouterr().out
