import pytest
import srsly

from conftest import ROOT
from scripts.common import UserError
from scripts.configure import SETTINGS, configure

VARS = srsly.read_yaml(ROOT / "project.yml")["vars"]
CARD = {name: VARS[name] for name in (*SETTINGS, "epochs")}
CARD |= {"gpu_id": -1, "encoder": "assets/encoder", "sentences": VARS["train_size"]}
TEMPLATE = ROOT / "configs" / "xlmr.cfg"


def resolved(**changes):
    return configure(TEMPLATE, **CARD | changes).interpolate()


def test_the_cards_hyperparameters_arrive_in_the_config():
    config = resolved(encoder_dropout=0.1, threshold=0.5)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    assert config["components"]["transformer"]["model"]["transformer_config"] == dropout
    assert config["components"]["ner"]["threshold"] == 0.5
    optimizer = config["training"]["optimizer"]
    assert [optimizer[key] for key in ("beta1", "beta2", "eps", "weight_decay")] == [0.9, 0.999, 1e-8, 0.01]
    rate = {"@schedules": "warmup_linear.v1", "initial_rate": 5e-5, "warmup_steps": 0, "total_steps": 210}
    assert optimizer["learn_rate"] == rate
    assert config["training"]["batcher"]["size"] == 24
    assert [config["training"][key] for key in ("seed", "max_epochs", "patience")] == [42, 0, 0]
    assert config["components"]["transformer"]["model"]["name"] == "assets/encoder"
    assert [VARS[f"{split}_size"] for split in ("train", "dev", "test")] == [1680, 840, 840]


@pytest.mark.parametrize(
    ("changes", "steps_per_epoch", "steps"),
    [
        ({"sentences": 25}, 2, 6),
        ({"epochs": 1}, 70, 70),
        ({"batch_size": 1}, 1680, 5040),
    ],
)
def test_steps_follow_from_sentences_batch_and_epochs(changes, steps_per_epoch, steps):
    training_config = resolved(**changes)["training"]
    assert (training_config["eval_frequency"], training_config["max_steps"]) == (steps_per_epoch, steps)
    assert training_config["optimizer"]["learn_rate"]["total_steps"] == steps


@pytest.mark.parametrize(("gpu_id", "allocator"), [(-1, None), (0, "pytorch")])
def test_mixed_precision_and_allocator_are_set_with_a_gpu_only(gpu_id, allocator):
    config = resolved(gpu_id=gpu_id)
    assert config["training"]["gpu_allocator"] == allocator
    assert config["components"]["transformer"]["model"]["mixed_precision"] is (gpu_id >= 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"seed": -5}, "seed is -5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"head_learning_rate_scale": -1.0}, "head_learning_rate_scale is -1.0"),
        ({"encoder_dropout": 2.0}, "encoder_dropout is 2.0"),
        ({"letter_case": 1.5}, "letter_case is 1.5"),
        ({"threshold": -0.1}, "threshold is -0.1"),
    ],
)
def test_a_hyperparameter_that_no_training_can_have_is_refused(changes, expected):
    with pytest.raises(UserError, match=expected):
        configure(TEMPLATE, **CARD | changes)
