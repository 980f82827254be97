"""Register what replaces a choice of this project in a comparison: the code for `spacy train --code`."""

from collections.abc import Iterable

import numpy
import torch
from spacy.language import Language
from spacy.training import Example
from thinc.api import torch2xp, xp2torch
from torch.nn.functional import cross_entropy

import scripts.train  # noqa: F401  registers what the training config names
from scripts.pipeline.token_ner import MASKED, TagScores, TokenNer


@Language.factory("softmax_ner", default_config={"scorer": {"@scorers": "spacy.ner_scorer.v1"}})
class SoftmaxNer(TokenNer):
    """`token_ner` trained with each token's cross-entropy; its transitions stay zero, so only valid IOB2 counts."""

    def get_loss(self, examples: Iterable[Example], scores: TagScores) -> tuple[float, TagScores]:
        """Return the mean cross-entropy of the annotated tokens in nats, and its gradient."""
        ops = self.model.ops
        emissions = xp2torch(ops.xp.concatenate(scores.emissions), requires_grad=True)
        gold = torch.tensor([tag for example in examples for tag in self.gold_tags(example)], device=emissions.device)
        loss = cross_entropy(emissions, gold, ignore_index=MASKED)
        loss.backward()
        lengths = numpy.array([len(doc_scores) for doc_scores in scores.emissions], dtype="int32")
        by_doc = ops.unflatten(torch2xp(emissions.grad), lengths)
        zeros = ops.xp.zeros_like(scores.transitions), ops.xp.zeros_like(scores.start)
        return float(loss.detach()), TagScores(by_doc, *zeros)
