"""The registered functions that only training needs: optimizer, batches, and a logger with the validation loss."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import matplotlib
import srsly
import torch
from spacy import registry
from spacy.language import Language
from spacy.training import Example
from spacy.training.loggers import console_logger_v3
from spacy.util import minibatch
from thinc.api import Optimizer, xp2torch
from thinc.types import FloatsXd

# `spacy train --code` imports this one file, by its path; the pipe is in the file that the package carries
sys.path.insert(0, str(Path(__file__).parent))
import token_ner  # noqa: E402

matplotlib.use("agg")


class TokenClassificationAdam(Optimizer):
    """PyTorch's fused AdamW, as the transformers Trainer uses it, with a faster rate for the head.

    Biases and LayerNorm weights are not decayed. A step in which no parameter got a gradient does not advance the
    schedules: spaCy's loop begins with one, see `sentence_batches`.

    thinc's own Adam adds epsilon at another place, and on a CPU its update of a model with 250,000 embeddings takes
    more than twice as long.
    """

    def __init__(self, learn_rate: Iterator[float], *, head_learning_rate_scale: float, **settings: Any) -> None:
        super().__init__(learn_rate, use_averages=False, **settings)
        self.head_learning_rate_scale = head_learning_rate_scale
        self.of_parameter: dict[tuple[int, str], torch.optim.AdamW] = {}
        self.updated = False

    def __call__(
        self, key: tuple[int, str], weights: FloatsXd, gradient: FloatsXd, *, lr_scale: float = 1.0
    ) -> tuple[FloatsXd, FloatsXd]:
        """Updates one parameter in place and zeroes its gradient; `key` is the id of its model and its name there."""
        name = key[1]
        tensor = xp2torch(weights)  # the same memory, on the CPU and on a GPU
        if key not in self.of_parameter:
            decayed = not (name.endswith("bias") or name == "b" or "LayerNorm" in name)
            self.of_parameter[key] = torch.optim.AdamW(
                [torch.nn.Parameter(tensor)],
                betas=(self.b1, self.b2),
                eps=self.eps,
                weight_decay=self.L2 if decayed else 0.0,
                fused=True,
            )
        optimizer = self.of_parameter[key]
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        parameter.data = tensor
        parameter.grad = xp2torch(gradient)
        torch.nn.utils.clip_grad_norm_([parameter], self.grad_clip)
        # PyTorch names the encoder's parameters by dotted paths; the head is thinc's: W and b
        head_scale = 1.0 if "." in name else self.head_learning_rate_scale
        group["lr"] = self.learn_rate * lr_scale * head_scale
        optimizer.step()
        parameter.grad.zero_()
        self.updated = True
        return weights, gradient

    def step_schedules(self) -> None:
        """Advances the learning rate, once for each update that happened."""
        if self.updated:
            super().step_schedules()
        self.updated = False


@registry.optimizers("panx_xlmr.TokenClassificationAdam.v1")
def token_classification_adam(
    learn_rate: Iterator[float],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_clip: float,
    head_learning_rate_scale: float,
) -> Optimizer:
    """Adam for a pretrained encoder under a randomly initialised head.

    learn_rate: the encoder's rate at each update. head_learning_rate_scale: the head's rate is that many times it, so
    that the head can learn in the few hundred steps in which the encoder only moves a little. grad_clip: the largest
    L2 norm of one parameter's gradient.
    """
    return TokenClassificationAdam(
        learn_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        L2=weight_decay,
        grad_clip=grad_clip,
        head_learning_rate_scale=head_learning_rate_scale,
    )


@registry.batchers("panx_xlmr.SentenceBatches.v1")
def sentence_batches(size: int) -> Callable[[Iterable[Example]], Iterator[list[Example]]]:
    """Batches of exactly `size` sentences; the last one of an epoch has what is left.

    The very first batch of a run is empty. spaCy counts its steps from 0 and scores after the step whose number is a
    multiple of `eval_frequency`; with step 0 spent on nothing, the step's number is the number of updates, the end of
    each epoch is scored, and so are the last weights.
    """
    runs = itertools.count()

    def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
        if next(runs) == 0:
            yield []
        yield from minibatch(examples, size)

    return batches


@registry.loggers("panx_xlmr.TrainingLogger.v1")
def training_logger(
    dev_corpus: Callable[[Language], Iterable[Example]], output_file: str, plot_file: str
) -> Callable[[Language, IO, IO], tuple[Callable[[dict[str, Any] | None], None], Callable[[], None]]]:
    """spaCy's console table and progress bar, and beside it the model card's table.

    After each epoch a row goes to `output_file` (JSONL): `training_loss`, the mean of the batches' cross-entropies
    since the row before, in nats; `epoch`; `step`, the number of updates; `validation_loss`, the mean cross-entropy
    over all tokens of `dev_corpus`; and spaCy's scores there as fractions. `plot_file` (PNG) shows all rows so far.
    """

    def setup_logger(
        nlp: Language, stdout: IO = sys.stdout, stderr: IO = sys.stderr
    ) -> tuple[Callable[[dict[str, Any] | None], None], Callable[[], None]]:
        log_to_console, finalize = console_logger_v3(progress_bar="eval")(nlp, stdout, stderr)
        steps_per_epoch = nlp.config["training"]["eval_frequency"]
        rows: list[dict[str, Any]] = []
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(output_file).unlink(missing_ok=True)
        Path(plot_file).unlink(missing_ok=True)

        def log_step(info: dict[str, Any] | None) -> None:
            if info is None:
                return log_to_console(None)
            for pipe in nlp.pipe_names:
                info["losses"].setdefault(pipe, 0.0)  # step 0 has none: its batch is empty
            log_to_console(info)
            if info["step"]:
                step, scores = info["step"], info["other_scores"]
                rows.append(
                    {
                        "training_loss": info["losses"]["ner"] / steps_per_epoch,
                        "epoch": step / steps_per_epoch,
                        "step": step,
                        "validation_loss": validation_loss(nlp, dev_corpus(nlp)),
                        **{key: scores[key] for key in ("ents_p", "ents_r", "ents_f")},
                    }
                )
                srsly.write_jsonl(output_file, rows)
                plot_training(rows, Path(plot_file))

        return log_step, finalize

    return setup_logger


def validation_loss(nlp: Language, examples: Iterable[Example], batch_size: int = 64) -> float:
    """The mean cross-entropy, in nats, over all tokens that have a gold tag, with dropout off."""
    ner = nlp.get_pipe("ner")
    total, tokens = 0.0, 0
    for batch in minibatch(sorted(examples, key=len), batch_size):
        docs = [example.predicted for example in batch]
        for name, pipe in nlp.pipeline:
            if name != "ner":
                docs = list(pipe.pipe(docs))
        loss, _ = ner.get_loss(batch, ner.predict(docs))
        count = sum(tag != token_ner.MASKED for example in batch for tag in ner.gold_tags(example))
        total, tokens = total + loss * count, tokens + count
    return total / tokens


def plot_training(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws both losses (nats a token) and F1 on the validation sentences against the step."""
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, (losses, score) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    losses.plot(steps, [row["training_loss"] for row in rows], marker="o", label="training")
    losses.plot(steps, [row["validation_loss"] for row in rows], marker="o", label="validation")
    losses.set(title="Cross-entropy a token", xlabel="step", ylabel="nats", ylim=(0, None))
    losses.legend()
    score.plot(steps, [row["ents_f"] for row in rows], marker="o", color="tab:green")
    score.set(title="F1 on the validation sentences", xlabel="step", ylabel="F1", ylim=(0, 1))
    for axes in (losses, score):
        axes.set_xticks(steps)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
