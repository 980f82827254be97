"""The registered functions that only training needs: optimizer, words, batches, a logger with the validation loss."""

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import matplotlib.pyplot
import srsly
import torch
from matplotlib.figure import Figure
from spacy import registry
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy.training.loggers import console_logger_v3
from spacy.util import compile_infix_regex, compile_suffix_regex, minibatch
from thinc.api import Optimizer, xp2torch
from thinc.types import FloatsXd

from scripts.pipeline import token_ner

matplotlib.use("agg")


class TokenClassificationAdam(Optimizer):
    """PyTorch's fused AdamW, as the transformers Trainer uses it, with a rate for the head that is times the encoder's.

    Biases and LayerNorm weights are not decayed, and of the embeddings only those that training has read. A step in
    which no parameter got a gradient does not advance the schedules: spaCy's loop begins with one, see
    `sentence_batches`.

    thinc's own Adam adds epsilon at another place, and on a CPU its update of a model with 250,000 embeddings takes
    many times as long.
    """

    def __init__(
        self,
        learn_rate: Iterator[float],
        *,
        head_learning_rate_scale: float,
        **settings: Any,
    ) -> None:
        super().__init__(learn_rate, use_averages=False, **settings)
        self.head_learning_rate_scale = head_learning_rate_scale
        self.of_parameter: dict[tuple[int, str], torch.optim.AdamW] = {}
        self.of_encoder: dict[int, tuple[torch.optim.AdamW, RowsAdam]] = {}
        self.updated = False

    def __call__(
        self, key: tuple[int, str], weights: FloatsXd, gradient: FloatsXd, *, lr_scale: float = 1.0
    ) -> tuple[FloatsXd, FloatsXd]:
        """Updates a parameter of the head in place, zeroes its gradient; `key`: its layer's id and its name there."""
        tensor = xp2torch(weights)  # the same memory, on the CPU and on a GPU
        if key not in self.of_parameter:
            parameter = torch.nn.Parameter(tensor)
            self.of_parameter[key] = self._adam([{"params": [parameter], "weight_decay": self._decay(key[1])}])
        optimizer = self.of_parameter[key]
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        parameter.data = tensor
        parameter.grad = xp2torch(gradient)
        torch.nn.utils.clip_grad_norm_([parameter], self.grad_clip)
        group["lr"] = self.learn_rate * lr_scale * self.head_learning_rate_scale
        optimizer.step()
        parameter.grad.zero_()
        self.updated = True
        return weights, gradient

    def update_encoder(
        self,
        key: int,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        table: torch.Tensor,
        read: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Updates all parameters of a transformer in place.

        key: the id of what holds it. parameters: the transformer's, with their names there and their gradients.
        table: its embeddings, shape (pieces, width). read: pairs of numbers of rows of the table, each at most once,
        and those rows' gradients.
        """
        if key not in self.of_encoder:
            groups = [{"params": [parameter], "weight_decay": self._decay(name)} for name, parameter in parameters]
            self.of_encoder[key] = self._adam(groups), RowsAdam(table, self._adam, self._decay("weight"))
        optimizer, rows = self.of_encoder[key]
        for group in optimizer.param_groups:
            group["lr"] = self.learn_rate
            torch.nn.utils.clip_grad_norm_(group["params"], self.grad_clip)
        optimizer.step()
        rows.step(read, self.learn_rate, self.grad_clip)
        self.updated = True

    def step_schedules(self) -> None:
        """Advances the learning rate, once for each update that happened."""
        if self.updated:
            super().step_schedules()
        self.updated = False

    def _adam(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, betas=(self.b1, self.b2), eps=self.eps, fused=True)

    def _decay(self, name: str) -> float:
        # PyTorch names the encoder's parameters by dotted paths; of the head's, W are a linear layer's weights
        return self.L2 if name == "W" or (name.endswith("weight") and "LayerNorm" not in name) else 0.0


class RowsAdam:
    """AdamW on those rows of a table that have ever had a gradient; the others stay as they are.

    The result is what AdamW on the whole table gives, but for the weight decay of the rows never read. It costs what
    the rows read so far cost: for a vocabulary of 250,000 pieces of which training reads a tenth, a tenth.
    """

    def __init__(
        self, table: torch.Tensor, make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.AdamW], decay: float
    ) -> None:
        self.table = table
        self.rows = torch.empty(0, dtype=torch.int64, device=table.device)
        self.place_of = torch.full((len(table),), -1, device=table.device)
        # spare places are all zeros, and zeros with no gradient stay zeros
        self.values = torch.nn.Parameter(table.new_zeros(1024, table.shape[1]))
        self.optimizer = make_optimizer([{"params": [self.values], "weight_decay": decay}])

    @torch.no_grad()
    def step(self, read: Sequence[tuple[torch.Tensor, torch.Tensor]], learn_rate: float, grad_clip: float) -> None:
        """Updates the table. read: pairs of numbers of rows and those rows' gradients, (rows,) and (rows, width)."""
        for rows, _ in read:
            self._add(rows[self.place_of[rows] < 0])
        self.values.grad = torch.zeros_like(self.values)
        for rows, gradient in read:
            self.values.grad.index_add_(0, self.place_of[rows], gradient)
        torch.nn.utils.clip_grad_norm_([self.values], grad_clip)
        self.optimizer.param_groups[0]["lr"] = learn_rate
        self.optimizer.step()
        self.table.index_copy_(0, self.rows, self.values[: len(self.rows)])

    def _add(self, rows: torch.Tensor) -> None:
        used = len(self.rows)
        needed = used + len(rows)
        if needed > len(self.values):
            more = self.values.new_zeros(max(needed, 2 * len(self.values)) - len(self.values), self.values.shape[1])
            state = self.optimizer.state[self.values]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in state:
                    state[moment] = torch.cat([state[moment], more])
            self.values.data = torch.cat([self.values, more])
        self.values[used:needed] = self.table[rows]
        self.place_of[rows] = torch.arange(used, needed, device=rows.device)
        self.rows = torch.cat([self.rows, rows])


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
    that the head can learn in the few hundred steps in which the encoder only moves a little. grad_clip: the largest L2
    norm of one parameter's gradient.
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


@registry.callbacks("panx_xlmr.SplitQuotesAndInitials.v1")
def split_quotes_and_initials() -> Callable[[Language], None]:
    """Makes a language's tokenizer split what PAN-X splits and spaCy does not: runs of apostrophes inside a word
    (`Federer''6-4`) and the period after a single letter (`Serie B.`).

    Without it no entity can end there. What belongs together the pipe finds out. For `initialize.before_init`; the
    trained pipeline's own tokenizer file holds the result.
    """

    def customize(nlp: Language) -> None:
        nlp.tokenizer.suffix_search = compile_suffix_regex([*nlp.Defaults.suffixes, r"(?<=^\w)\."]).search
        nlp.tokenizer.infix_finditer = compile_infix_regex(["'{2,}", *nlp.Defaults.infixes]).finditer
        nlp.tokenizer.rules = {
            text: rule for text, rule in nlp.tokenizer.rules.items() if not re.fullmatch(r"\w\.", text)
        }

    return customize


@registry.augmenters("panx_xlmr.SplitQuotes.v1")
def split_quotes() -> Callable[[Language, Example], Iterator[Example]]:
    """Cuts opening quotes off the words of training sentences, `''Strada` into `''` and `Strada`, as tokenizers do.

    PAN-X has them glued to the first word of what is no entity (779 of 791 in the Italian training sentences), and
    apart before entities. A pipe that learns from that finds an entity in all that is in quotes in a text.
    """

    def augment(nlp: Language, example: Example) -> Iterator[Example]:
        words: list[str] = []
        spaces: list[bool] = []
        tags: list[str] = []
        for token in example.reference:
            tag = f"{token.ent_iob_}-{token.ent_type_}" if token.ent_type_ else "O"
            quotes = re.match(r"('{2,}(?=[^']))?", token.text).group()
            if quotes:
                words.append(quotes)
                spaces.append(False)
                tags.append(tag if tag[0] == "I" else "O")
            words.append(token.text.removeprefix(quotes))
            spaces.append(bool(token.whitespace_))
            tags.append(tag)
        gold = Doc(nlp.vocab, words=words, spaces=spaces, ents=tags)
        yield Example(Doc(nlp.vocab, words=words, spaces=spaces), gold)

    return augment


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

    After each epoch a row goes to `output_file` (JSONL): `training_loss`, the mean of the batches' losses
    since the row before, in nats a token; `epoch`; `step`, the number of updates; `validation_loss`, the same
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
                figure = plot_training(rows)
                figure.savefig(plot_file, dpi=120)
                matplotlib.pyplot.close(figure)

        return log_step, finalize

    return setup_logger


def validation_loss(nlp: Language, examples: Iterable[Example], batch_size: int = 64) -> float:
    """The negative log-likelihood of the gold tags, in nats a token, over all of the examples, with dropout off."""
    ner = nlp.get_pipe("ner")
    total, tokens = 0.0, 0
    for batch in minibatch(sorted(examples, key=len), batch_size):
        docs = [example.predicted for example in batch]
        for name, pipe in nlp.pipeline:
            if name == "ner":
                break
            docs = list(pipe.pipe(docs))
        loss, _ = ner.get_loss(batch, ner.predict(docs))
        count = sum(tag != token_ner.MASKED for example in batch for tag in ner.gold_tags(example))
        total, tokens = total + loss * count, tokens + count
    return total / tokens


def plot_training(rows: list[dict[str, Any]]) -> Figure:
    """Both losses (nats a token), and F1 on the validation sentences, against the step."""
    steps = [row["step"] for row in rows]
    figure, (losses, score) = matplotlib.pyplot.subplots(2, 1, figsize=(4.2, 5.5), layout="constrained")
    losses.plot(steps, [row["training_loss"] for row in rows], marker="o", label="training")
    losses.plot(steps, [row["validation_loss"] for row in rows], marker="o", label="validation")
    losses.set(title="Negative log-likelihood a token", xlabel="step", ylabel="nats", ylim=(0, None))
    losses.legend()
    score.plot(steps, [row["ents_f"] for row in rows], marker="o", color="tab:green")
    score.set(title="F1 on the validation sentences", xlabel="step", ylabel="F1", ylim=(0, 1))
    for axes in (losses, score):
        axes.set_xticks(steps)
        axes.grid(alpha=0.3)
    return figure
