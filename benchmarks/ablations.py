"""What the project would be without one of its choices: registered functions for `spacy train --code`."""

from collections.abc import Callable, Iterable, Iterator

import numpy
from spacy import registry
from spacy.language import Language
from spacy.training import Example
from thinc.api import Model
from thinc.types import Floats2d

from scripts.pipeline import token_ner


@Language.factory("softmax_ner", default_config={"scorer": {"@scorers": "spacy.ner_scorer.v1"}})
def make_softmax_ner(nlp: Language, name: str, model: Model, scorer: Callable | None) -> "SoftmaxNer":
    """Creates the pipe from a config; see SoftmaxNer."""
    return SoftmaxNer(nlp.vocab, model, name, scorer=scorer)


class SoftmaxNer(token_ner.TokenNer):
    """`token_ner` trained by each token's cross-entropy: the transitions stay zero, decoding stays valid IOB2."""

    def get_loss(self, examples: Iterable[Example], scores: token_ner.TagScores) -> tuple[float, token_ner.TagScores]:
        """The cross-entropy, in nats, averaged over the tokens that have a gold tag, and its gradient."""
        xp = self.model.ops.xp
        gold = xp.asarray([tag for example in examples for tag in self.gold_tags(example)], dtype="int64")
        flat: Floats2d = xp.concatenate(scores.emissions)
        shifted = flat - flat.max(axis=1, keepdims=True)
        log_probabilities = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
        rows = xp.arange(len(gold))[gold != token_ner.MASKED]
        count = max(len(rows), 1)
        gradient = xp.zeros_like(flat)
        gradient[rows] = xp.exp(log_probabilities[rows])
        gradient[rows, gold[rows]] -= 1
        by_doc = self.model.ops.unflatten(gradient / count, numpy.array([len(s) for s in scores.emissions], dtype="i"))
        loss = -float(log_probabilities[rows, gold[rows]].sum()) / count
        zeros = xp.zeros_like(scores.transitions), xp.zeros_like(scores.start)
        return loss, token_ner.TagScores(by_doc, *zeros)


@registry.augmenters("panx_xlmr.PanxWords.v1")
def panx_words() -> Callable[[Language, Example], Iterator[Example]]:
    """Leaves the words of training sentences as PAN-X has them."""

    def augment(nlp: Language, example: Example) -> Iterator[Example]:
        yield example

    return augment
