import copy
import pickle
import tracemalloc

import numpy
import pytest
import spacy
import torch
from spacy.tokens import Doc
from spacy.tokens.underscore import Underscore
from spacy.training import Example
from spacy_transformers.layers import trfs2arrays
from spacy_transformers.layers.hf_shim import HFShim
from thinc.api import Adam, ConfigValidationError, Optimizer, reduce_first
from transformers import AutoModel, AutoTokenizer

from scripts.pipeline import blank_pipeline, encoder, linear, pipes
from scripts.pipeline.tokenizer import encoder_text


@pytest.fixture(scope="module")
def nlp(tiny_encoder):
    return pipeline(tiny_encoder)


def pipeline(folder, architecture="panx_xlmr.TransformerModel.v2", **settings):
    nlp = blank_pipeline("it")
    model = {"@architectures": architecture, "name": str(folder), "tokenizer_config": {"use_fast": True}} | settings
    if architecture.startswith("panx"):
        model = {"mixed_precision": False, "transformer_config": {}} | model
    nlp.add_pipe("transformer", config={"model": model})
    nlp.add_pipe("panx_xlmr_ner_v2", name="ner")
    nlp.initialize(lambda: [annotated(nlp)])
    return nlp


def shim(nlp):
    return nlp.get_pipe("transformer").model.layers[0].shims[0]


def annotated(nlp):
    words = ["Anna", "Neri", "vive", "a", "Bari"]
    return Example(Doc(nlp.vocab, words=words), Doc(nlp.vocab, words=words, ents=["B-PER", "I-PER", "O", "O", "B-LOC"]))


def vectors(nlp, texts):
    """Each text's wordpiece vectors, the first special token's before them."""
    docs = nlp.get_pipe("transformer").pipe([nlp.make_doc(text) for text in texts])
    return [doc._.trf_data.model_output.last_hidden_state[0] for doc in docs]


def test_vectors_are_the_transformers_own_whatever_else_is_in_the_batch(nlp, sample, tiny_encoder):
    texts = [" ".join(sentence.words) for sentence in sample["train"][:40]]
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_encoder), AutoModel.from_pretrained(tiny_encoder).eval()
    for text, found in zip(texts, vectors(nlp, texts), strict=True):
        read, _ = encoder_text(nlp.make_doc(text))
        with torch.no_grad():
            expected = model(**tokenizer(read, return_tensors="pt")).last_hidden_state[0, :-1]
        assert found == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize(
    "text, read",
    [
        ("È MORTO A. MANZONI, L'AUTORE", "è morto a. manzoni, l' autore"),
        ("Ciao! NON CI CREDO, MARIO! E la NATO?", "Ciao! non ci credo, mario! E la NATO?"),
        ("ROMA, 3 MAGGIO, ORE 12\r\nIl sindaco di ROMA", "roma, 3 maggio, ore 12\r\nIl sindaco di ROMA"),
        ("İZMIR È IN TURCHIA\n\n", "İzmir è in turchia\n\n"),
        *((same, same) for same in ("CGIL, CISL", "G. B. ROSSI", "La CORTE DI GIUSTIZIA EUROPEA decide", "\n", "È")),
        ("L’arrivo dell'Italia", "L’ arrivo dell' Italia"),
        ("**Anna** («Eni»)\x0bBari", "** Anna** (« Eni»)\x0b Bari"),
        *((same, same) for same in ("Emilia-Romagna", "10km", "Cefalu\u0300 e", "nulla")),
    ],
)
def test_capitals_are_read_in_lower_case_and_a_word_after_a_sign_as_after_a_space(nlp, text, read):
    assert encoder_text(nlp.make_doc(text))[0] == read
    found, expected = vectors(nlp, [text, read])
    assert (found == expected).all()


def token_pieces(nlp, doc):
    """The wordpieces that each token of a Doc aligns with."""
    data = nlp.get_pipe("transformer")(doc)._.trf_data
    (pieces,) = data.wordpieces.strings
    rows = numpy.split(data.align.dataXd, numpy.cumsum(data.align.lengths)[:-1])
    return [[pieces[row].replace("▁", "") for row in token] for token in rows]


@pytest.mark.parametrize(
    "words",
    [
        ["dell'Italia", "oggi"],
        ["dell'", "Italia", "oggi"],
        ["d", "ell'It", "alia", "oggi"],
        ["«", "Eni", "»", "Roma", "(", "Bari", ")", "Anna", "oggi"],  # read with four more spaces
    ],
)
def test_a_token_aligns_with_the_wordpieces_that_hold_its_characters(nlp, words):
    spaces = [False] * (len(words) - 2) + [True, False]
    doc = Doc(nlp.vocab, words=words, spaces=spaces)
    for word, pieces in zip(words, token_pieces(nlp, doc), strict=True):
        joined = "".join(pieces)
        assert word in joined
        assert joined in doc.text.replace(" ", "")


@pytest.mark.parametrize("nothing", ["\u200b", "\n", "  ", "\ufeff"])
def test_a_token_without_a_wordpiece_aligns_with_the_first_special_token(nlp, nothing):
    assert token_pieces(nlp, Doc(nlp.vocab, words=["Bari", nothing, "oggi"]))[1] == ["<s>"]


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 220, 221, 1000])
def test_each_wordpiece_gets_its_vector_from_the_window_that_shows_most_around_it(length):
    windows = list(encoder.window_bounds(length))
    assert [i for _, _, first, last in windows for i in range(first, last)] == list(range(length))

    def context(i, window):
        # what the text's own beginning and end leave out is no loss
        start, end, _, _ = window
        return min(i - start if start else length, end - 1 - i if end < length else length)

    for window in windows:
        assert window[1] - window[0] <= encoder.WINDOW
        for i in range(window[2], window[3]):
            assert context(i, window) >= max(context(i, other) for other in windows if other[0] <= i < other[1]) - 1


def test_a_long_text_is_its_windows(nlp, sample):
    text = " ".join(" ".join(sentence.words) for sentence in sample["train"][:100])
    (whole,) = vectors(nlp, [text])
    ids = nlp.get_pipe("transformer")(nlp.make_doc(text))._.trf_data.wordpieces.input_ids[0, 1:].tolist()
    transformer = nlp.get_pipe("transformer").model.transformer.eval()
    bounds = list(encoder.window_bounds(len(ids)))
    assert len(bounds) > 10
    for start, end, first, last in bounds[3:5]:
        with torch.no_grad():
            alone = transformer(torch.tensor([[0, *ids[start:end], 2]])).last_hidden_state[0, 1:-1].numpy()
        assert whole[1 + first : 1 + last] == pytest.approx(alone[first - start : last - start], abs=1e-5)


def test_a_long_texts_vectors_are_in_memory_once(nlp):
    long, empty = nlp.get_pipe("transformer").pipe([nlp.make_doc("Bari " * 20_000), nlp.make_doc("")])
    ner = nlp.get_pipe("ner")
    tracemalloc.start()
    found = ner.predict([long, empty]).emissions
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < long._.trf_data.model_output.last_hidden_state.nbytes / 2
    assert found[0] == pytest.approx(ner.model.predict([long]).emissions[0], abs=1e-6)
    assert found[1].shape == (0, len(ner.tags))


def test_a_long_text_is_a_batch_of_its_own(nlp):
    docs = [Doc(nlp.vocab, words=["Bari"] * length) for length in (1, 2, pipes.MAX_TOKENS + 1, 3, 4, 5)]
    assert [list(map(len, batch)) for batch in pipes.batches(docs, 2)] == [[1, 2], [8193], [3, 4], [5]]
    assert [list(map(len, batch)) for batch in pipes.batches(docs[1:4], 9)] == [[2], [8193], [3]]


class Recorder(Optimizer):
    """thinc's optimizer, which keeps what gradients it was given."""

    def __call__(self, key, weights, gradient, *, lr_scale=1.0):
        self.gradients = getattr(self, "gradients", {}) | {key[1]: numpy.array(gradient)}
        return super().__call__(key, weights, gradient, lr_scale=lr_scale)


def test_gradients_are_those_of_spacy_transformers_own_layer(tiny_encoder):
    settings = {"transformer_config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    ours = pipeline(tiny_encoder, **settings)
    settings["get_spans"] = {"@span_getters": "spacy-transformers.doc_spans.v1"}
    stock = pipeline(tiny_encoder, "spacy-transformers.TransformerModel.v3", **settings)
    stock.get_pipe("ner").model.from_bytes(ours.get_pipe("ner").model.to_bytes())
    recorded = []
    for pipe in (stock, ours):
        optimizer = Recorder(0.001)
        pipe.update([annotated(pipe), annotated(pipe)], sgd=False, drop=0.0)
        for name in ("transformer", "ner"):
            pipe.get_pipe(name).finish_update(optimizer)
        recorded.append(optimizer.gradients)
    expected, found = recorded
    assert "embeddings.word_embeddings.weight" in expected
    assert set(found) == set(expected)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=1e-5), name


def test_the_listener_equals_spacy_transformers_pooling(nlp, sample):
    docs = [nlp.make_doc(text) for text in ("", *(" ".join(s.words) for s in sample["train"][:5]), " ", "Bari")]
    data = [doc._.trf_data for doc in nlp.get_pipe("transformer").pipe(docs)]
    results = []
    for layer in (trfs2arrays(reduce_first(), grad_factor=1.0), pipes.first_wordpieces()):
        arrays, backprop = layer(data, is_train=True)
        gradients = backprop([array * 2 for array in arrays])
        results.append([*arrays, *(gradient.model_output.last_hidden_state for gradient in gradients)])
    for their, our in zip(*results, strict=True):
        assert their == pytest.approx(our, abs=1e-6)


def test_from_disk_and_from_pickle_it_has_the_same_vectors_and_bytes(nlp, tmp_path):
    nlp.to_disk(tmp_path)
    (before,) = vectors(nlp, ["Anna vive a Bari."])
    for other in (spacy.load(tmp_path), pickle.loads(pickle.dumps(nlp))):
        assert numpy.array_equal(vectors(other, ["Anna vive a Bari."])[0], before)
        assert shim(other).to_bytes() == shim(nlp).to_bytes()


def test_threads_predict_while_another_saves(nlp, tmp_path, monkeypatch):
    expected, to_bytes = vectors(nlp, ["Bari"]), HFShim.to_bytes
    found = []
    monkeypatch.setattr(HFShim, "to_bytes", lambda self: (found.extend(vectors(nlp, ["Bari"])), to_bytes(self))[1])
    nlp.to_disk(tmp_path)
    assert (found[0] == expected[0]).all()


def test_a_call_of_the_tokenizer_leaves_no_settings(nlp):
    text = "Anna Neri vive a Bari"
    expected = vectors(nlp, [text])
    nlp.get_pipe("transformer").model.tokenizer(text, truncation=True, max_length=3)
    assert (vectors(nlp, [text])[0] == expected[0]).all()


def test_entities_without_the_transformer_or_with_other_tokens_are_an_error(tiny_encoder):
    nlp = pipeline(tiny_encoder)
    with nlp.select_pipes(disable="transformer"), pytest.raises(ValueError, match="needs the transformer"):
        nlp("Anna vive a Bari")
    nlp.add_pipe("merge_entities", before="ner")
    nlp.add_pipe("entity_ruler", first=True).add_patterns([{"label": "PER", "pattern": "Anna Neri"}])
    with pytest.raises(ValueError, match="merges or splits tokens"):
        nlp("Anna Neri vive a Bari")


def test_the_score_is_there_in_processes_that_are_not_forks(nlp):
    pickle.dumps(Underscore.get_state())  # spaCy sends it to them


def test_a_pipe_can_have_a_transformer_of_its_own(tiny_encoder, tmp_path):
    nlp = pipeline(tiny_encoder)
    doc = nlp.make_doc("Anna vive a Bari.")
    before = nlp.get_pipe("ner").predict([nlp.get_pipe("transformer")(doc)]).emissions[0]
    nlp.replace_listeners("transformer", "ner", ["model.tok2vec"])
    nlp.remove_pipe("transformer")
    nlp.to_disk(tmp_path)
    for other in (nlp, spacy.load(tmp_path)):
        assert other.get_pipe("ner").predict([other.make_doc(doc.text)]).emissions[0] == pytest.approx(before, abs=1e-6)


def test_a_tokenizer_without_a_largest_length_is_saved_and_loaded(tiny_encoder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, model_max_length=10**30)
    tokenizer.save_pretrained(tmp_path / "encoder")
    AutoModel.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "encoder")
    nlp = pipeline(tmp_path / "encoder")
    nlp.to_disk(tmp_path / "model")
    assert [len(doc) for doc in spacy.load(tmp_path / "model").pipe(["Bari " * 600])] == [600]


def test_a_tokenizer_that_gives_no_positions_is_refused(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, use_fast=False)
    with pytest.raises(ValueError, match="not a fast tokenizer.*tokenizer.json"):
        encoder.prepare_tokenizer(tokenizer)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients_are_pytorchs(bias):
    torch.manual_seed(0)
    theirs = torch.nn.Linear(40, 30, bias=bias)
    ours = copy.deepcopy(theirs)
    ours.__class__ = linear.OneDnnLinear
    results = []
    for layer in (theirs, ours):
        x = torch.linspace(-1, 1, 4 * 7 * 40).view(4, 7, 40).requires_grad_()
        output = layer(x)
        output.backward(torch.linspace(1, 2, output.numel()).view_as(output))
        with torch.inference_mode():
            assert torch.allclose(layer(x), output, atol=1e-5)
        results.append([output, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for their, our in zip(*results, strict=True):
        assert torch.allclose(their, our, rtol=1e-5, atol=1e-4)


def test_a_frozen_linear_layer_passes_the_gradient_on():
    layer = torch.nn.Linear(3, 2).requires_grad_(False)
    layer.__class__ = linear.OneDnnLinear
    x = torch.ones(1, 3, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], layer.weight.sum(dim=0))
    assert layer.weight.grad is None


@pytest.fixture()
def has_bfloat16(monkeypatch):
    monkeypatch.setattr(encoder, "_has_bfloat16", lambda device: True)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.1), ("int8", 0.3)])
def test_lower_precision_gives_almost_the_same_vectors_and_keeps_the_weights(
    tiny_encoder, has_bfloat16, precision, tolerance
):
    exact, fast = pipeline(tiny_encoder), pipeline(tiny_encoder, precision=precision)
    texts = ["Anna vive a Bari.", "La Banca d'Italia di Roma"]
    for one, two in zip(vectors(exact, texts), vectors(fast, texts), strict=True):
        assert two.dtype == numpy.float32
        assert 0 < numpy.abs(one - two).max() < tolerance
    assert shim(fast).to_bytes() == shim(exact).to_bytes()
    assert len(pickle.dumps(fast)) == pytest.approx(len(pickle.dumps(exact)), abs=99)


def test_a_program_that_calls_update_trains_embeddings_and_predicts_with_the_new_weights(tiny_encoder, has_bfloat16):
    nlp = pipeline(tiny_encoder, precision="bfloat16")
    table = shim(nlp)._model.get_input_embeddings().weight
    weights, (before,) = table.detach().clone(), vectors(nlp, ["Anna vive a Bari."])
    # `nlp.update` updates the transformer before the pipe behind it has passed its gradient back: at the next call
    for _ in range(2):
        nlp.update([annotated(nlp)], sgd=Adam(0.01))
    learnt = (table.detach() != weights).any(dim=1).nonzero().flatten().tolist()
    assert learnt == sorted(set(nlp.get_pipe("transformer").model.tokenizer(annotated(nlp).text)["input_ids"]))
    (after,) = vectors(nlp, ["Anna vive a Bari."])
    assert numpy.abs(after - before).max() > 0.05


@pytest.mark.parametrize("lowest", [-1, 0, 2])
def test_an_8_bit_layer_computes_what_the_layer_does_wherever_its_inputs_lie(lowest):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 8), torch.rand(16, 64) + lowest
    layer.weight.data.abs_()  # so that a wrong zero point does not cancel out
    with torch.inference_mode():
        found, expected = linear.Int8Linear(layer, x.abs().amax(dim=0))(x), layer(x)
    assert (found - expected).abs().max() < 0.01


def test_in_8_bits_a_texts_vectors_do_not_depend_on_the_rest_of_its_batch(tiny_encoder):
    nlp = pipeline(tiny_encoder, precision="int8")
    texts = ["Anna vive a Bari.", "La Banca d'Italia di Roma è la banca centrale.", "Bari"]
    for together, text in zip(vectors(nlp, texts), texts, strict=True):
        assert together == pytest.approx(vectors(nlp, [text])[0], abs=1e-5)


def test_where_bfloat16_is_not_faster_a_warning_says_that_float32_is_used(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "_has_bfloat16", lambda device: False)
    pipeline(tiny_encoder, precision="bfloat16").to_disk(tmp_path)
    with pytest.warns(UserWarning, match="not faster in bfloat16"):
        loaded = spacy.load(tmp_path)
    exact = spacy.load(tmp_path, config={"components.transformer.model.precision": "float32"})
    texts = ["Anna vive a Bari."]
    assert (vectors(loaded, texts)[0] == vectors(exact, texts)[0]).all()
    with pytest.raises(ConfigValidationError, match="precision"):
        spacy.load(tmp_path, config={"components.transformer.model.precision": "int4"})


@pytest.mark.parametrize(
    ("processor", "capability", "taken"),
    [
        ("AuthenticAMD", "AVX512", linear.OneDnnLinear),
        ("AuthenticAMD", "AVX2", torch.nn.Linear),
        ("GenuineIntel", "AVX512", torch.nn.Linear),
    ],
)
def test_the_matrix_kernel_depends_on_the_processor_alone(monkeypatch, processor, capability, taken):
    linear.onednn_is_faster.cache_clear()
    monkeypatch.setattr(linear.Path, "read_text", lambda path: f"vendor_id: {processor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    linear.faster_linear(module)
    linear.onednn_is_faster.cache_clear()
    assert type(module[0]) is taken
