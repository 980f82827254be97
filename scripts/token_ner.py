"""The pipe `token_ner`: named entities by classifying each token's IOB2 tag, on top of a shared transformer.

This file is all the code of ours that a trained pipeline needs, so it is what the installable package carries.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy
from spacy import registry
from spacy.language import Language
from spacy.pipeline import TrainablePipe
from spacy.tokens import Doc, Span
from spacy.training import Example, biluo_to_iob, validate_examples, validate_get_examples
from spacy.vocab import Vocab
from thinc.api import Config, Dropout, Linear, Model, Ops, chain, with_array
from thinc.types import Floats2d

OUTSIDE = 0  # tag ids: O is 0, then come B and I of each label in turn
MASKED = -1  # stands for the tag of a token that is not annotated or cannot be aligned

DEFAULT_MODEL = """
[model]
@architectures = "panx_xlmr.TokenClassifier.v1"

[model.tok2vec]
@architectures = "spacy-transformers.TransformerListener.v1"
grad_factor = 1.0
pooling = {"@layers":"reduce_first.v1"}
"""


def _bert_init(ops: Ops, shape: tuple[int, ...]) -> numpy.ndarray:
    # Devlin et al. 2019 start every linear layer so; numpy's generator is the one that spaCy's seed sets
    return ops.asarray(numpy.random.normal(scale=0.02, size=shape).astype("float32"))


@registry.architectures("panx_xlmr.TokenClassifier.v1")
def token_classifier(
    tok2vec: Model[list[Doc], list[Floats2d]], nO: int | None = None
) -> Model[list[Doc], list[Floats2d]]:
    """Dropout and a linear layer on each token's vector: the usual transformers head for token classification.

    tok2vec: gives an array of shape (tokens, width) for each Doc. nO: the number of tags, known once the pipe has its
    labels. The output holds for each Doc an array of unnormalised scores, shape (tokens, nO).
    """
    output_layer = Linear(nO, init_W=_bert_init)
    model = chain(tok2vec, with_array(chain(Dropout(), output_layer)))
    model.set_ref("output_layer", output_layer)
    return model


@Language.factory(
    "token_ner",
    assigns=["doc.ents", "token.ent_iob", "token.ent_type"],
    default_config={
        "model": Config().from_str(DEFAULT_MODEL)["model"],
        "scorer": {"@scorers": "spacy.ner_scorer.v1"},
    },
    default_score_weights={"ents_f": 1.0, "ents_p": 0.0, "ents_r": 0.0, "ents_per_type": None},
)
def make_token_ner(
    nlp: Language, name: str, model: Model[list[Doc], list[Floats2d]], scorer: Callable | None
) -> "TokenNer":
    """Creates the pipe from a config; see TokenNer."""
    return TokenNer(nlp.vocab, model, name, scorer=scorer)


class TokenNer(TrainablePipe):
    """Sets `doc.ents` from one IOB2 tag per token.

    The tags of a Doc are the sequence with the highest sum of log-probabilities among those that are valid IOB2
    (Viterbi decoding), so an entity never begins with an I- tag of another label. Entities and blocked tokens that
    earlier pipes set are kept, as spaCy's own `ner` keeps them; only the tokens between them are labelled.
    """

    def __init__(
        self,
        vocab: Vocab,
        model: Model[list[Doc], list[Floats2d]],
        name: str = "ner",
        *,
        scorer: Callable | None = None,
    ) -> None:
        super().__init__(vocab, model, name, labels=[])
        self.scorer = scorer

    @property
    def labels(self) -> tuple[str, ...]:
        """The entity labels, in the order of their tag ids."""
        return tuple(self.cfg["labels"])

    @property
    def label_data(self) -> tuple[str, ...]:
        """What `spacy init labels` stores and `initialize(labels=…)` takes."""
        return self.labels

    @property
    def tags(self) -> tuple[str, ...]:
        """The IOB2 tags, in the order of the columns of the scores."""
        return ("O", *(f"{prefix}-{label}" for label in self.labels for prefix in "BI"))

    def add_label(self, label: str) -> int:
        """Adds an entity label, also to a trained pipe, whose other scores stay as they are.

        Returns 1, or 0 if the label is there already. Raises ValueError for anything but a non-empty string.
        """
        if not isinstance(label, str) or not label:
            raise ValueError(f"An entity label is a non-empty string, not {label!r}.")
        if label in self.labels:
            return 0
        self.cfg["labels"].append(label)
        self.vocab.strings.add(label)
        old = self.model.get_ref("output_layer")
        if old.has_param("W"):
            # thinc fixes the size of a layer that has weights, so that a larger one has to take its place
            new = Linear(len(self.tags), old.get_dim("nI"))
            for parameter in ("W", "b"):
                weights = old.get_param(parameter)
                grown = new.ops.alloc((len(self.tags), *weights.shape[1:]))
                grown[: len(weights)] = weights
                new.set_param(parameter, grown)
            self.model.replace_node(old, new)
            self.model.set_ref("output_layer", new)
        return 1

    def initialize(
        self,
        get_examples: Callable[[], Iterable[Example]],
        *,
        nlp: Language | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Takes the labels from `labels`, or else from the examples' entities in alphabetical order; sets up the model.

        Raises ValueError where `get_examples` gives nothing usable or there is no label at all.
        """
        validate_get_examples(get_examples, "TokenNer.initialize")
        if labels is None:
            labels = sorted({ent.label_ for example in get_examples() for ent in example.reference.ents})
        for label in labels:
            self.add_label(label)
        self._require_labels()
        self.model.get_ref("output_layer").set_dim("nO", len(self.tags))
        self.model.initialize(X=[next(iter(get_examples())).reference])

    def predict(self, docs: Iterable[Doc]) -> list[Floats2d]:
        """The unnormalised tag scores of each Doc, shape (tokens, tags)."""
        docs = list(docs)
        if not any(len(doc) for doc in docs):
            return [self.model.ops.alloc2f(0, len(self.tags)) for _ in docs]
        return self.model.predict(docs)

    def set_annotations(self, docs: Iterable[Doc], scores: Sequence[Floats2d]) -> None:
        """Decodes each Doc's scores, shape (tokens, tags), and sets its entities."""
        for doc, doc_scores in zip(docs, scores, strict=True):
            doc_scores = self.model.ops.to_numpy(doc_scores)
            blocked = [doc[t.i : t.i + 1] for t in doc if t.ent_iob == 3 and not t.ent_type]
            fixed = [*doc.ents, *blocked]
            found = []
            for start, end in _gaps(fixed, len(doc)):
                is_space = numpy.array([doc[i].is_space for i in range(start, end)])
                tags = decode_iob2(doc_scores[start:end], is_space)
                for first, last, label in _entities(tags):
                    while is_space[last - 1]:
                        last -= 1
                    found.append(Span(doc, start + first, start + last, label=self.labels[label]))
            doc.set_ents([*doc.ents, *found], blocked=blocked)

    def get_loss(self, examples: Iterable[Example], scores: Sequence[Floats2d]) -> tuple[float, list[Floats2d]]:
        """The cross-entropy, in nats, averaged over the tokens that have a gold tag, and its gradient for each score.

        Tokens whose annotation is missing, or that cannot be aligned with the gold tokens, count for nothing.
        Raises ValueError for a gold label that the pipe does not know.
        """
        validate_examples(examples, "TokenNer.get_loss")
        xp = self.model.ops.xp
        gold = xp.asarray([tag for example in examples for tag in self.gold_tags(example)], dtype="int64")
        flat = xp.concatenate(list(scores))
        rows = xp.arange(len(gold))[gold != MASKED]
        gradient = xp.zeros_like(flat)
        loss = 0.0
        if len(rows):
            log_probabilities = _log_softmax(flat[rows], xp)
            loss = -float(log_probabilities[xp.arange(len(rows)), gold[rows]].mean())
            gradient[rows] = xp.exp(log_probabilities)
            gradient[rows, gold[rows]] -= 1
            gradient /= len(rows)
        return loss, self.model.ops.unflatten(gradient, numpy.array([len(s) for s in scores], dtype="int32"))

    def gold_tags(self, example: Example) -> list[int]:
        """The gold tag id of each token of `example.predicted`, MASKED where there is none."""
        ids = {tag: i for i, tag in enumerate(self.tags)}
        tags = biluo_to_iob(example.get_aligned_ner())
        try:
            return [MASKED if tag is None else ids[tag] for tag in tags]
        except KeyError as error:
            raise ValueError(
                f"The gold tag {error} is of no label of the pipe '{self.name}', which knows {', '.join(self.labels)}; "
                "add the label before training."
            ) from None


def decode_iob2(scores: numpy.ndarray, is_space: numpy.ndarray) -> list[int]:
    """The best valid IOB2 sequence: Viterbi decoding (Forney 1973) over transitions that are either allowed or not.

    scores: (tokens, tags), unnormalised; tag ids as TokenNer.tags orders them. is_space: (tokens,) booleans; no entity
    begins at such a token. Returns one tag id a token.
    """
    if not len(scores):
        return []
    log_probabilities = _log_softmax(scores, numpy)
    begins = numpy.arange(1, scores.shape[1], 2)
    inside = begins + 1
    log_probabilities[numpy.ix_(is_space, begins)] = -numpy.inf
    greedy = log_probabilities.argmax(axis=1)
    previous = numpy.concatenate([[OUTSIDE], greedy[:-1]])
    is_inside = (greedy > OUTSIDE) & (greedy % 2 == 0)
    # where the best tag of every token already makes a valid sequence, no other sequence can have a higher sum
    if numpy.all(~is_inside | (previous == greedy) | (previous == greedy - 1)):
        return greedy.tolist()
    best = log_probabilities[0].copy()
    best[inside] = -numpy.inf
    pointers = numpy.zeros(scores.shape, dtype="int32")
    for i in range(1, len(scores)):
        # O and B may follow any tag; I only the B or the I of its own label
        pointers[i] = best.argmax()
        pointers[i, inside] = numpy.where(best[begins] >= best[inside], begins, inside)
        best = best[pointers[i]] + log_probabilities[i]
    tags = [int(best.argmax())]
    for i in range(len(scores) - 1, 0, -1):
        tags.append(int(pointers[i, tags[-1]]))
    return tags[::-1]


def _log_softmax(scores: Floats2d, xp: Any) -> Floats2d:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))


def _entities(tags: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, token after the last, index of the label) of each entity in a valid sequence of tag ids."""
    start = 0
    for end in range(1, len(tags) + 1):
        if end == len(tags) or tags[end] == OUTSIDE or tags[end] % 2 == 1:
            if tags[start] != OUTSIDE:
                yield start, end, (tags[start] - 1) // 2
            start = end


def _gaps(spans: Iterable[Span], length: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the runs of tokens that none of the spans covers."""
    start = 0
    for span in [*sorted(spans, key=lambda span: span.start), None]:
        end = length if span is None else span.start
        if start < end:
            yield start, end
        if span is not None:
            start = span.end
