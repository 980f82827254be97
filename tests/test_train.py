import math

import numpy
import pytest
import spacy
import srsly
import torch
from spacy.tokens import Doc, Span
from spacy.training import Corpus, Example
from thinc.api import warmup_linear

from scripts import train as training


def optimizer(**changes):
    settings = {
        "learn_rate": warmup_linear(0.1, 0, 10),
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "head_learning_rate_scale": 20.0,
    }
    return training.TokenClassificationAdam(**settings | changes)


def move(adam, name, gradient):
    """How far one update moves a weight that was 1: of the head, or by its dotted name of a transformer."""
    weights, gradients = numpy.ones(1, dtype="float32"), numpy.asarray([gradient], dtype="float32")
    if "." not in name:
        adam((0, name), weights, gradients)
    else:
        parameter = torch.nn.Parameter(torch.from_numpy(weights))
        parameter.grad = torch.from_numpy(gradients)
        adam.update_encoder(0, [(name, parameter)], torch.zeros(1, 1), [])
    return 1 - float(weights[0])


@pytest.mark.parametrize(
    ("name", "factor"), [("W", 20), ("transitions", 20), ("encoder.layer.0.output.dense.weight", 1)]
)
def test_only_the_head_moves_by_the_scaled_rate(name, factor):
    # Adam's first update is the learning rate, whatever the gradient
    assert move(optimizer(), name, 0.5) == pytest.approx(0.1 * factor, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("encoder.layer.0.output.dense.weight", True),
        ("encoder.layer.0.output.dense.bias", False),
        ("embeddings.LayerNorm.weight", False),
        ("W", True),
        ("b", False),
        ("transitions", False),
    ],
)
def test_biases_layer_norms_and_transitions_are_not_decayed(name, decayed):
    adam = optimizer(weight_decay=0.5, head_learning_rate_scale=1.0)
    assert move(adam, name, 0.0) == pytest.approx(0.05 if decayed else 0.0, abs=1e-6)


def test_rows_of_a_table_that_were_read_move_as_all_rows_would_and_the_others_stay():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5000, 3, generator=generator)
    whole = torch.nn.Parameter(table.clone())
    adam = torch.optim.AdamW([whole], lr=0.01, weight_decay=0.0)
    rows = training.RowsAdam(table, lambda groups: torch.optim.AdamW(groups), 0.0)
    read = torch.zeros(5000, dtype=torch.bool)
    before = table.clone()
    for count in (10, 700, 1500, 10, 3):
        ids = torch.randperm(5000, generator=generator)[:count]
        gradient = torch.randn(count, 3, generator=generator)
        whole.grad = torch.zeros_like(whole).index_add_(0, ids, gradient)
        adam.step()
        rows.step([(ids[: count // 2], gradient[: count // 2]), (ids[count // 2 :], gradient[count // 2 :])], 0.01, 1e9)
        read[ids] = True
    assert torch.allclose(table, whole.detach(), atol=1e-6)
    assert torch.equal(table[~read], before[~read])


def test_several_updates_are_those_of_adam_on_the_clipped_gradient():
    adam = optimizer(learn_rate=warmup_linear(0.1, 0, 1000), eps=1e-3, head_learning_rate_scale=1.0)
    gradients = numpy.random.default_rng(0).normal(size=(5, 4)) * [[0.1], [3], [0.2], [9], [0.3]]
    weights, expected = numpy.ones(4, dtype="float32"), numpy.ones(4)
    first = second = numpy.zeros(4)
    for step, gradient in enumerate(gradients, start=1):
        adam((0, "W"), weights, gradient.astype("float32"))
        clipped = gradient / max(1, numpy.linalg.norm(gradient))
        first, second = 0.9 * first + 0.1 * clipped, 0.999 * second + 0.001 * clipped**2
        expected -= 0.1 * (first / (1 - 0.9**step)) / (numpy.sqrt(second / (1 - 0.999**step)) + 1e-3)
    assert weights == pytest.approx(expected, abs=1e-5)


def test_the_rate_goes_down_once_for_each_update_that_happened():
    adam = optimizer()
    adam.step_schedules()
    assert adam.learn_rate == pytest.approx(0.1)
    move(adam, "W", 1.0)
    adam.step_schedules()
    assert adam.learn_rate == pytest.approx(0.09)


def test_only_the_first_batch_of_a_run_is_an_empty_text_and_the_others_are_full(annotated):
    batches = training.sentence_batches(24)
    first, second = ([[len(example) for example in batch] for batch in batches([annotated] * 50)] for _ in range(2))
    assert first == [[0], *second]
    assert [len(batch) for batch in second] == [24, 24, 2]


@pytest.fixture
def annotated():
    """An example with all kinds of annotation, of which one entity is missing."""
    nlp = spacy.blank("it")
    words = ["Anna", "vive", "a", "Gießen", "."]
    gold = Doc(nlp.vocab, words=words, spaces=[True, True, True, False, False], ents=["B-PER", "O", "O", None, "O"])
    gold[1].tag_ = "V"
    gold.cats = {"news": 1.0}
    gold.spans["names"] = [Span(gold, 0, 1, label="PER")]
    return Example(Doc(nlp.vocab, words=words, spaces=[True, True, True, False, False]), gold)


def test_letter_case_changes_a_share_of_the_texts_and_keeps_all_annotation(annotated):
    nlp = spacy.blank("it")
    augment = training.letter_case(0.5)
    examples = [eg for _ in range(400) for eg in augment(nlp, annotated)]
    texts = [eg.text for eg in examples]
    assert 150 < texts.count("Anna vive a Gießen.") < 280
    assert set(texts) == {
        "Anna vive a Gießen.",
        "ANNA VIVE A Gießen.",
        "anna vive a gießen.",
        "Anna Vive A Gießen.",
        "ANNA vive a Gießen.",
        "anna vive a Gießen.",
    }

    for changed in examples:
        assert changed.get_aligned_ner() == ["U-PER", "O", "O", None, "O"]
        assert changed.reference[1].tag_ == "V"
        assert changed.reference.cats == {"news": 1.0}
        assert [(span.start, span.end) for span in changed.reference.spans["names"]] == [(0, 1)]


def test_a_row_for_each_epoch_counts_updates_and_has_the_mean_loss_of_its_batches_and_the_saved_weights_scores(project):
    rows = list(srsly.read_jsonl(project / "metrics" / "training.jsonl"))
    # 43 sentences in batches of 6
    assert [(row["epoch"], row["step"]) for row in rows] == [(epoch, 8 * epoch) for epoch in range(1, 11)]
    assert rows[-1]["training_loss"] < rows[0]["training_loss"] < 2 * math.log(7)
    nlp = spacy.load(project / "training" / "model-last")
    examples = list(Corpus(project / "corpus" / "dev.spacy", gold_preproc=True)(nlp))
    docs = [nlp.get_pipe("transformer")(example.predicted) for example in examples]
    loss, _ = nlp.get_pipe("ner").get_loss(examples, nlp.get_pipe("ner").predict(docs))
    assert rows[-1]["validation_loss"] == pytest.approx(loss, rel=1e-4)
    assert rows[-1]["ents_f"] == pytest.approx(nlp.evaluate(examples)["ents_f"])
