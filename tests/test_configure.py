import pytest
import spacy
import srsly
from spacy.schemas import ConfigSchemaTraining
from spacy.tokens import Doc, DocBin
from spacy.util import load_config, registry

from conftest import ROOT
from scripts import configure as configure_script
from scripts.common import UserError
from scripts.configure import configure

CARD = {
    "lang": "it",
    "encoder": "assets/encoder",
    "sentences": 1680,
    "learning_rate": 5e-5,
    "head_learning_rate_scale": 60.0,
    "batch_size": 24,
    "epochs": 3,
    "seed": 42,
    "letter_case": 0.0,
    "gpu_id": -1,
}
TEMPLATE = ROOT / "configs" / "xlmr.cfg"


def resolved(**changes):
    return configure(TEMPLATE, **CARD | changes).interpolate()


def test_the_cards_hyperparameters_arrive_in_the_config():
    config = resolved()
    optimizer = config["training"]["optimizer"]
    assert (optimizer["beta1"], optimizer["beta2"], optimizer["eps"]) == (0.9, 0.999, 1e-8)
    assert optimizer["weight_decay"] == 0.01
    assert optimizer["learn_rate"]["@schedules"] == "warmup_linear.v1"
    assert optimizer["learn_rate"]["initial_rate"] == 5e-5
    assert optimizer["learn_rate"]["warmup_steps"] == 0
    assert optimizer["learn_rate"]["total_steps"] == 210
    assert config["training"]["batcher"]["size"] == 24
    assert config["training"]["seed"] == 42
    assert config["components"]["transformer"]["model"]["name"] == "assets/encoder"


def test_project_yml_holds_the_cards_hyperparameters():
    variables = srsly.read_yaml(ROOT / "project.yml")["vars"]
    card = {"learning_rate": 5e-5, "batch_size": 24, "epochs": 3, "seed": 42}
    assert {key: variables[key] for key in card} == card
    assert [variables[f"{split}_size"] for split in ("train", "dev", "test")] == [1680, 840, 840]


def test_the_card_scores_at_steps_70_140_and_210_and_ends_there():
    config = resolved()
    assert [config["training"][key] for key in ("eval_frequency", "max_steps", "max_epochs", "patience")] == [
        70,
        210,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("changes", "steps_per_epoch", "steps"),
    [
        ({"sentences": 20000}, 834, 2502),
        ({"sentences": 25}, 2, 6),
        ({"epochs": 1}, 70, 70),
        ({"batch_size": 1}, 1680, 5040),
    ],
)
def test_steps_follow_from_sentences_batch_and_epochs(changes, steps_per_epoch, steps):
    training_config = resolved(**changes)["training"]
    assert (training_config["eval_frequency"], training_config["max_steps"]) == (steps_per_epoch, steps)
    assert training_config["optimizer"]["learn_rate"]["total_steps"] == steps


def test_the_learning_rate_falls_in_a_line_from_the_first_update_to_zero():
    settings = resolved()["training"]["optimizer"]["learn_rate"]
    rate = registry.resolve({"learn_rate": settings})["learn_rate"]
    rates = [next(rate) for _ in range(211)]
    assert rates == pytest.approx([5e-5 * (1 - step / 210) for step in range(211)])


def test_nothing_of_a_gpu_without_one():
    config = resolved()
    assert config["training"]["gpu_allocator"] is None
    assert config["components"]["transformer"]["model"]["mixed_precision"] is False


def test_mixed_precision_and_allocator_with_a_gpu():
    config = resolved(gpu_id=0)
    assert config["training"]["gpu_allocator"] == "pytorch"
    assert config["components"]["transformer"]["model"]["mixed_precision"] is True


def test_another_language_is_another_pipeline():
    assert resolved(lang="es")["nlp"]["lang"] == "es"


def test_the_written_config_is_full_and_resolves(tmp_path):
    path = tmp_path / "config.cfg"
    configure(TEMPLATE, **CARD).to_disk(path)
    settings = registry.resolve(load_config(path).interpolate()["training"], schema=ConfigSchemaTraining)
    assert settings["optimizer"].learn_rate == 5e-5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"seed": -5}, "seed is -5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"head_learning_rate_scale": -1.0}, "head_learning_rate_scale is -1.0"),
        ({"letter_case": 1.5}, "letter_case is 1.5"),
    ],
)
def test_a_hyperparameter_that_no_training_can_have_is_refused(changes, expected):
    with pytest.raises(UserError, match=expected):
        configure(TEMPLATE, **CARD | changes)


OPTIONS = [
    "--learning-rate",
    "5e-5",
    "--head-learning-rate-scale",
    "60",
    "--batch-size",
    "24",
    "--epochs",
    "3",
    "--seed",
    "42",
    "--letter-case",
    "0.1",
    "--lang",
    "it",
    "--gpu-id",
    "-1",
]


def test_the_command_counts_the_sentences_and_says_how_to_train_for_other_steps(tmp_path, capsys):
    vocab = spacy.blank("it").vocab
    DocBin(docs=[Doc(vocab, words=["Roma"], ents=["B-LOC"])] * 49).to_disk(tmp_path / "train.spacy")
    arguments = dict(zip([o[2:].replace("-", "_") for o in OPTIONS[::2]], OPTIONS[1::2], strict=True))
    rates = ("learning_rate", "head_learning_rate_scale", "letter_case")
    types = {"lang": str} | dict.fromkeys(rates, float)
    configure_script.main(
        TEMPLATE,
        tmp_path / "config.cfg",
        train=tmp_path / "train.spacy",
        **{key: types.get(key, int)(value) for key, value in arguments.items()},
    )
    assert load_config(tmp_path / "config.cfg")["training"]["max_steps"] == 9
    said = " ".join(capsys.readouterr().out.split())
    assert "9 steps" in said
    assert "--training.max_steps N --training.optimizer.learn_rate.total_steps N" in said


def test_a_broken_corpus_gets_one_sentence_and_writes_nothing(refused, tmp_path):
    (tmp_path / "train.spacy").write_bytes(b"half a file")
    output = refused(configure_script, TEMPLATE, tmp_path / "config.cfg", *OPTIONS, "--train", tmp_path / "train.spacy")
    assert "not a readable DocBin" in output
    assert not (tmp_path / "config.cfg").exists()
