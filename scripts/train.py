"""The registered functions of training: optimizer, batches, letter case, and a logger with the validation loss."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import srsly
import torch
from matplotlib.figure import Figure
from spacy import registry
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy.training.loggers import console_logger_v3
from spacy.util import minibatch
from thinc.api import Optimizer, xp2torch
from thinc.types import FloatsXd

from scripts.pipeline import token_ner

# The changes of `letter_case`, equally probable: the method of str, and whether only entities change.
CASES = (("upper", False), ("upper", False), ("lower", False), ("title", False), ("upper", True), ("lower", True))


@registry.optimizers("panx_xlmr.TokenClassificationAdam.v1")
class TokenClassificationAdam(Optimizer):
    """PyTorch's fused AdamW, as in the transformers Trainer, for a pretrained encoder under an untrained head.

    Weight decay leaves out biases, LayerNorm weights and embeddings that no batch has read. A step without gradients
    does not advance the schedules: spaCy's loop begins with one, see `sentence_batches`. thinc's own Adam adds epsilon
    elsewhere, and is many times slower on a table of 250,000 embeddings.
    """

    def __init__(
        self,
        learn_rate: Iterator[float],
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        grad_clip: float,
        head_learning_rate_scale: float,
    ) -> None:
        """Create the optimizer; the head's learning rate is `head_learning_rate_scale` times the encoder's.

        The head learns from scratch in a few hundred steps. grad_clip: the largest L2 norm of one parameter's gradient.
        """
        settings = {"beta1": beta1, "beta2": beta2, "eps": eps, "L2": weight_decay, "grad_clip": grad_clip}
        super().__init__(learn_rate, use_averages=False, **settings)
        self.head_learning_rate_scale = head_learning_rate_scale
        self.of_parameter: dict[tuple[int, str], torch.optim.AdamW] = {}
        self.of_encoder: dict[int, tuple[torch.optim.AdamW, RowsAdam]] = {}
        self.updated = False

    def __call__(
        self, key: tuple[int, str], weights: FloatsXd, gradient: FloatsXd, *, lr_scale: float = 1.0
    ) -> tuple[FloatsXd, FloatsXd]:
        """Update a parameter of the head in place and zero its gradient. key: its layer's id and its name there."""
        tensor = xp2torch(weights)  # the same memory, on the CPU and on a GPU
        if key not in self.of_parameter:
            parameter = torch.nn.Parameter(tensor)
            self.of_parameter[key] = self._adam([{"params": [parameter], "weight_decay": self._decay(key[1])}])
        optimizer = self.of_parameter[key]
        (group,) = optimizer.param_groups
        (parameter,) = group["params"]
        parameter.data = tensor
        parameter.grad = xp2torch(gradient)
        clip([parameter.grad], self.grad_clip)
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
        """Update all parameters of a transformer in place.

        key: the id of its shim. parameters: names and parameters that have a gradient. table: the embeddings, shape
        (pieces, width). read: pairs of row numbers of the table, each at most once, and these rows' gradients.
        """
        if key not in self.of_encoder:
            decays = sorted({self._decay(name) for name, _ in parameters})
            groups = [
                {"params": [p for name, p in parameters if self._decay(name) == decay], "weight_decay": decay}
                for decay in decays
            ]
            self.of_encoder[key] = self._adam(groups), RowsAdam(table, self._adam, self._decay("weight"))
        optimizer, rows = self.of_encoder[key]
        clip([parameter.grad for _, parameter in parameters], self.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = self.learn_rate
        optimizer.step()
        rows.step(read, self.learn_rate, self.grad_clip)
        self.updated = True

    def step_schedules(self) -> None:
        """Advance the learning rate, if there was an update."""
        if self.updated:
            super().step_schedules()
        self.updated = False

    def _adam(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, betas=(self.b1, self.b2), eps=self.eps, fused=True)

    def _decay(self, name: str) -> float:
        # dotted names are the encoder's; W is the weight of the head's linear layer
        return self.L2 if name == "W" or (name.endswith("weight") and "LayerNorm" not in name) else 0.0


def clip(gradients: list[torch.Tensor], largest: float) -> None:
    """Scale each gradient in place to an L2 norm of at most `largest`."""
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((largest / (norms + 1e-6)).clamp(max=1.0)))


class RowsAdam:
    """AdamW on the rows of a table that have had a gradient; all others stay unchanged.

    This equals AdamW on the whole table, except that rows never read are not decayed. Time and memory are proportional
    to the rows read so far: a tenth of a vocabulary of 250,000 pieces, say.
    """

    def __init__(
        self, table: torch.Tensor, make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.AdamW], decay: float
    ) -> None:
        self.table = table
        self.rows = torch.empty(0, dtype=torch.int64, device=table.device)
        self.place_of = torch.full((len(table),), -1, device=table.device)
        # it grows in steps; unused rows are zero, and stay so without a gradient
        self.values = torch.nn.Parameter(table.new_zeros(1024, table.shape[1]))
        self.optimizer = make_optimizer([{"params": [self.values], "weight_decay": decay}])

    @torch.no_grad()
    def step(self, read: Sequence[tuple[torch.Tensor, torch.Tensor]], learn_rate: float, grad_clip: float) -> None:
        """Update the table. read: pairs of row numbers, shape (rows,), and their gradients, shape (rows, width)."""
        for rows, _ in read:
            self._add(rows[self.place_of[rows] < 0])
        self.values.grad = torch.zeros_like(self.values)
        for rows, gradient in read:
            self.values.grad.index_add_(0, self.place_of[rows], gradient)
        clip([self.values.grad], grad_clip)
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


@registry.augmenters("panx_xlmr.LetterCase.v1")
def letter_case(share: float) -> Callable[[Language, Example], Iterator[Example]]:
    """Change the letter case of a share of the training texts, so that capitals are not the only cue.

    CASES says how. Tokens and all annotation stay; a word whose length would change stays too.
    """

    def augment(nlp: Language, example: Example) -> Iterator[Example]:
        if random.random() >= share:
            yield example
            return
        way, only_entities = random.choice(CASES)
        words = [
            token.text if only_entities and not token.ent_type else _with_case(token.text, way)
            for token in example.reference
        ]
        spaces = [bool(token.whitespace_) for token in example.reference]
        # the lengths are the same, so that all annotation, missing tags included, fits the new text
        changed = Doc(nlp.vocab, words=words, spaces=spaces)
        yield Example(changed, Doc(nlp.vocab).from_dict(example.reference.to_dict() | {"text": changed.text}))

    return augment


def _with_case(word: str, way: str) -> str:
    changed = getattr(word, way)()
    return changed if len(changed) == len(word) else word


@registry.batchers("panx_xlmr.SentenceBatches.v1")
def sentence_batches(size: int) -> Callable[[Iterable[Example]], Iterator[list[Example]]]:
    """Create batches of `size` sentences; the last one of an epoch may be smaller.

    The first batch of a run is an empty text. spaCy counts steps from 0 and scores after each step divisible by
    `eval_frequency`; a step 0 that learns nothing makes the step's number the number of updates, so that the end of
    each epoch and the last weights are scored.
    """
    is_first = True

    def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
        nonlocal is_first
        for batch in minibatch(examples, size):
            if is_first:
                is_first, vocab = False, batch[0].predicted.vocab
                yield [Example(Doc(vocab), Doc(vocab))]
            yield batch

    return batches


@registry.loggers("panx_xlmr.TrainingLogger.v3")
def training_logger(
    dev_corpus: Callable[[Language], Iterable[Example]], output_file: str, plot_file: str
) -> Callable[[Language, IO, IO], tuple[Callable, Callable]]:
    """Log spaCy's console table and progress bar, and the model card's table.

    After each evaluation a row goes to `output_file` (JSONL): `training_loss`, the batches' mean loss since the last
    row, in nats per word; `epoch`, from 1; `step`, the number of updates; `validation_loss`, over all words of
    `dev_corpus`; and spaCy's scores there as fractions. `plot_file` (PNG) shows all rows so far.
    """

    def setup_logger(nlp: Language, stdout: IO, stderr: IO) -> tuple[Callable, Callable]:
        log_to_console, finalize = console_logger_v3(progress_bar="eval")(nlp, stdout, stderr)
        rows: list[dict[str, Any]] = []
        Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(output_file).unlink(missing_ok=True)
        Path(plot_file).unlink(missing_ok=True)

        def log_step(info: dict[str, Any] | None) -> None:
            log_to_console(info)
            if info and info["step"]:
                step, scores = info["step"], info["other_scores"]
                updates = step - (rows[-1]["step"] if rows else 0)
                row = {"training_loss": info["losses"]["ner"] / updates, "epoch": info["epoch"] + 1, "step": step}
                row["validation_loss"] = validation_loss(nlp, dev_corpus(nlp))
                rows.append(row | {key: scores[key] for key in ("ents_p", "ents_r", "ents_f")})
                srsly.write_jsonl(output_file, rows)
                plot_training(rows).savefig(plot_file, dpi=120)

        return log_step, finalize

    return setup_logger


def validation_loss(nlp: Language, examples: Iterable[Example], batch_size: int = 64) -> float:
    """Return the negative log-likelihood of the gold tags, in nats per tag, over all examples, without dropout."""
    ner = nlp.get_pipe("ner")
    total, count = 0.0, 0
    for batch in minibatch(sorted(examples, key=len), batch_size):
        docs = list(nlp.pipe((example.predicted for example in batch), disable=["ner", "doc_cleaner"]))
        loss, _ = ner.get_loss(batch, ner.predict(docs))
        tags = sum(tag != token_ner.MASKED for example in batch for tag in ner.gold_tags(example))
        total, count = total + loss * tags, count + tags
    return total / count


def plot_training(rows: list[dict[str, Any]]) -> Figure:
    """Plot both losses, in nats per word, and F1 on the validation sentences against the step."""
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(4.2, 5.5), layout="constrained")
    losses, score = figure.subplots(2, 1)
    losses.plot(steps, [row["training_loss"] for row in rows], marker="o", label="training")
    losses.plot(steps, [row["validation_loss"] for row in rows], marker="o", label="validation")
    losses.set(title="Negative log-likelihood per word", xlabel="step", ylabel="nats", ylim=(0, None))
    losses.legend()
    score.plot(steps, [row["ents_f"] for row in rows], marker="o", color="tab:green")
    score.set(title="F1 on the validation sentences", xlabel="step", ylabel="F1", ylim=(0, 1))
    for axes in (losses, score):
        axes.set_xticks(steps)
        axes.grid(alpha=0.3)
    return figure
