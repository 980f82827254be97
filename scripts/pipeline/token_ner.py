"""The pipe `token_ner`: named entities by classifying each token's IOB2 tag, on top of a shared transformer.

The installable package carries this file, as it carries encoder.py and linear_tokenizer.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from spacy import registry
from spacy.language import Language
from spacy.pipeline import TrainablePipe
from spacy.tokens import Doc, Span, Token
from spacy.training import Example, biluo_to_iob, validate_examples, validate_get_examples
from spacy.vocab import Vocab
from thinc.api import Config, Dropout, Linear, Model, Ops, chain, torch2xp, with_array, xp2torch
from thinc.types import Floats1d, Floats2d, FloatsXd
from torch.nn.utils.rnn import pad_sequence

OUTSIDE = 0  # tag ids: O is 0, then come B and I of each label in turn
MASKED = -1  # stands for the tag of a token that is not annotated or cannot be aligned
APOSTROPHES = frozenset("'’")
QUOTES = APOSTROPHES | frozenset('"`‘“”«»')
PUNCTUATION = QUOTES | frozenset("()[]{},;:.!?%…¿¡")
IMPOSSIBLE = -1e4  # the score of what may not be: finite, so that no gradient becomes nan

if not Span.has_extension("score"):
    Span.set_extension("score", default=None)

DEFAULT_MODEL = """
[model]
@architectures = "panx_xlmr.CrfTokenClassifier.v1"

[model.tok2vec]
@architectures = "spacy-transformers.TransformerListener.v1"
grad_factor = 1.0
pooling = {"@layers":"reduce_first.v1"}
"""


@dataclass
class TagScores:
    """What the model says of a batch of Docs: unnormalised log-probabilities, or their gradient.

    emissions: for each Doc an array of shape (tokens, tags). transitions: shape (tags, tags), from the row's tag to the
    column's. start: shape (tags,), of a sequence that begins with the tag.
    """

    emissions: list[Floats2d]
    transitions: Floats2d
    start: Floats1d


def _bert_init(ops: Ops, shape: tuple[int, ...]) -> numpy.ndarray:
    # Devlin et al. 2019 start every linear layer so; numpy's generator is the one that spaCy's seed sets
    return ops.asarray(numpy.random.normal(scale=0.02, size=shape).astype("float32"))


@registry.architectures("panx_xlmr.CrfTokenClassifier.v1")
def crf_token_classifier(
    tok2vec: Model[list[Doc], list[Floats2d]], nO: int | None = None
) -> Model[list[Doc], TagScores]:
    """Dropout and a linear layer on each token's vector, and scores for each pair of adjacent tags: a linear-chain
    conditional random field (Lafferty, McCallum and Pereira 2001), whose scores start from zero.

    tok2vec: gives an array of shape (tokens, width) for each Doc. nO: the number of tags, known once the pipe has its
    labels.
    """
    output_layer = Linear(nO, init_W=_bert_init)
    transitions = transition_scores(nO)
    model = chain(tok2vec, with_array(chain(Dropout(), output_layer)), transitions)
    model.set_ref("output_layer", output_layer)
    model.set_ref("transitions", transitions)
    return model


def transition_scores(nO: int | None) -> Model[list[Floats2d], TagScores]:
    """Adds the scores of a sequence's first tag and of each pair of adjacent tags, nO tags, to the scores of tokens."""
    parameters = {"transitions": None, "start": None}
    return Model("transitions", _forward_transitions, init=_init_transitions, dims={"nO": nO}, params=parameters)


def _init_transitions(model: Model, X: Any = None, Y: Any = None) -> None:
    tags = model.get_dim("nO")
    model.set_param("transitions", model.ops.alloc2f(tags, tags))
    model.set_param("start", model.ops.alloc1f(tags))


def _forward_transitions(
    model: Model, emissions: list[Floats2d], is_train: bool
) -> tuple[TagScores, Callable[[TagScores], list[Floats2d]]]:
    def backprop(gradient: TagScores) -> list[Floats2d]:
        model.inc_grad("transitions", gradient.transitions)
        model.inc_grad("start", gradient.start)
        return gradient.emissions

    return TagScores(emissions, model.get_param("transitions"), model.get_param("start")), backprop


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

    The tags of a Doc are the sequence with the highest sum of scores among those that are valid IOB2 (Viterbi
    decoding), so an entity never begins with an I- tag of another label. White space has no tag: an entity may go on
    after it, but not after an empty line. Entities and blocked tokens that earlier pipes set are kept, as spaCy's own
    `ner` keeps them; only the tokens between them are labelled.

    `span._.score` of an entity that this pipe has set is the probability that it is one, with just these boundaries
    and this label; of any other span it is None.
    """

    def __init__(
        self,
        vocab: Vocab,
        model: Model[list[Doc], TagScores],
        name: str = "ner",
        *,
        scorer: Callable | None = None,
    ) -> None:
        super().__init__(vocab, model, name, labels=[])
        self.scorer = scorer

    @property
    def temperature(self) -> float:
        """What all scores are divided by for `span._.score`: what scripts/calibrate.py has found, or else 1."""
        return self.cfg.get("temperature", 1.0)

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
            # thinc fixes the size of a layer that has weights, so that larger ones have to take their places
            tags = len(self.tags)
            new = Linear(tags, old.get_dim("nI"))
            for parameter in ("W", "b"):
                weights = old.get_param(parameter)
                new.set_param(parameter, _grown(weights, (tags, *weights.shape[1:]), new.ops))
            self.model.replace_node(old, new)
            self.model.set_ref("output_layer", new)
            old = self.model.get_ref("transitions")
            new = transition_scores(tags)
            for parameter, shape in (("transitions", (tags, tags)), ("start", (tags,))):
                new.set_param(parameter, _grown(old.get_param(parameter), shape, new.ops))
            self.model.replace_node(old, new)
            self.model.set_ref("transitions", new)
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
        for layer in ("output_layer", "transitions"):
            self.model.get_ref(layer).set_dim("nO", len(self.tags))
        self.model.initialize(X=[next(iter(get_examples())).reference])

    def predict(self, docs: Iterable[Doc]) -> TagScores:
        """The scores of each Doc's tags."""
        docs = list(docs)
        if any(len(doc) for doc in docs):
            return self.model.predict(docs)
        transitions = self.model.get_ref("transitions")
        nothing = [self.model.ops.alloc2f(0, len(self.tags)) for _ in docs]
        return TagScores(nothing, transitions.get_param("transitions"), transitions.get_param("start"))

    def set_annotations(self, docs: Iterable[Doc], scores: TagScores) -> None:
        """Decodes each Doc's scores and sets its entities."""
        docs = list(docs)
        if not docs:
            return
        sequences = [list(tag_sequences(doc)) for doc in docs]
        # one array for all Docs, since each copy from a GPU waits for it
        every, *parameters = map(
            self.model.ops.to_numpy,
            (self.model.ops.xp.concatenate(scores.emissions), scores.transitions, scores.start),
        )
        ends = numpy.cumsum([len(doc_scores) for doc_scores in scores.emissions])
        emissions = [
            every[[end - len(doc) + start for start, _ in units]]
            for doc, end, doc_sequences in zip(docs, ends, sequences, strict=True)
            for units in doc_sequences
        ]
        segments = [list(_entities(tags)) for tags in decode_iob2(emissions, *parameters)]
        probabilities = segment_probabilities(emissions, *parameters, segments, self.temperature)
        found = iter(zip(segments, probabilities, strict=True))
        for doc, doc_sequences in zip(docs, sequences, strict=True):
            scored = {
                Span(doc, units[first][0], units[last - 1][1], label=self.labels[label]): probability
                for units in doc_sequences
                for (first, last, label), probability in zip(*next(found), strict=True)
            }
            doc.set_ents([*doc.ents, *scored], blocked=_blocked(doc))
            for span, probability in scored.items():
                span._.score = probability

    def get_loss(self, examples: Iterable[Example], scores: TagScores) -> tuple[float, TagScores]:
        """The negative log-likelihood, in nats, of the gold tags, divided by the number of them, and its gradient.

        Where the annotation is missing, or cannot be aligned with the gold tokens, any tag will do (Tsuboi et al.
        2008). Raises ValueError for a gold label that the pipe does not know.
        """
        validate_examples(examples, "TokenNer.get_loss")
        lengths = [len(doc_scores) for doc_scores in scores.emissions]
        rows, gold = [], []
        for example, end in zip(examples, numpy.cumsum(lengths), strict=True):
            tags = self.gold_tags(example)
            for units in tag_sequences(example.predicted):
                rows.append([int(end) - len(tags) + start for start, _ in units])
                gold.append([_unit_tag(tags[start:stop]) for start, stop in units])
        emissions, transitions, start = leaves = [
            xp2torch(scores, requires_grad=True)
            for scores in (self.model.ops.xp.concatenate(scores.emissions), scores.transitions, scores.start)
        ]
        count = sum(tag != MASKED for tags in gold for tag in tags)
        loss = negative_log_likelihood([emissions[r] for r in rows], transitions, start, gold) / max(count, 1)
        gradients = [torch2xp(g) for g in torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]
        by_doc = self.model.ops.unflatten(gradients[0], numpy.array(lengths, dtype="int32"))
        return float(loss.detach()), TagScores(by_doc, *gradients[1:])

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


def allowed_transitions(tags: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Which of IOB2's tags may follow which, booleans of shape (tags, tags), and which may begin a sequence: O and B-
    anywhere, I- after the B- or I- of its own label only.
    """
    follows = numpy.ones((tags, tags), dtype=bool)
    inside = numpy.arange(2, tags, 2)
    follows[:, inside] = False
    follows[inside, inside] = follows[inside - 1, inside] = True
    begins = numpy.ones(tags, dtype=bool)
    begins[inside] = False
    return follows, begins


def negative_log_likelihood(
    emissions: Sequence[torch.Tensor], transitions: torch.Tensor, start: torch.Tensor, gold: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The sum over sequences of minus the log-probability, in nats, of their gold tags among all valid IOB2 sequences.

    emissions: for each sequence a tensor of shape (tokens, tags). gold: tag ids, MASKED where any tag will do. It is
    the forward algorithm (Rabiner 1989) over all sequences, less the one over those that agree with the gold tags.
    """
    lengths = torch.tensor([len(tags) for tags in gold], device=start.device)
    if not lengths.any():
        return transitions.sum() * 0
    follows, begins = (torch.from_numpy(allowed).to(start.device) for allowed in allowed_transitions(len(start)))
    transitions = transitions.masked_fill(~follows, IMPOSSIBLE)
    start = start.masked_fill(~begins, IMPOSSIBLE)
    free = pad_sequence(emissions, batch_first=True)
    tags = pad_sequence([torch.tensor(tags, dtype=torch.int64) for tags in gold], batch_first=True).to(start.device)
    agrees = (tags[..., None] == MASKED) | (tags[..., None] == torch.arange(len(start), device=start.device))
    scores = torch.cat([free, free.masked_fill(~agrees, IMPOSSIBLE)])
    ended = torch.arange(scores.shape[1], device=start.device) >= lengths.repeat(2)[:, None]
    forward = start + scores[:, 0]
    for i in range(1, scores.shape[1]):
        onward = torch.logsumexp(forward[:, :, None] + transitions, dim=1) + scores[:, i]
        forward = torch.where(ended[:, i, None], forward, onward)
    every, agreeing = torch.logsumexp(forward, dim=1).where(lengths.repeat(2) > 0, 0.0).chunk(2)
    return (every - agreeing).sum()


def decode_iob2(
    emissions: Sequence[numpy.ndarray], transitions: numpy.ndarray, start: numpy.ndarray
) -> list[numpy.ndarray]:
    """The best valid IOB2 sequence of tag ids for each array of scores, shape (tokens, tags): Viterbi decoding
    (Forney 1973), of all sequences at a time.
    """
    follows, begins = allowed_transitions(len(start))
    transitions = numpy.where(follows, transitions, -numpy.inf)
    # the longest first: the sequences that have a token number i are then the first ones
    order = sorted(range(len(emissions)), key=lambda i: -len(emissions[i]))
    lengths = numpy.array([len(emissions[i]) for i in order], dtype="int64")
    tags = [numpy.zeros(len(scores), dtype="int64") for scores in emissions]
    if not lengths.any():
        return tags
    flat = numpy.concatenate([emissions[i] for i in order])
    first = numpy.cumsum(lengths) - lengths
    running = int((lengths > 0).sum())
    best = numpy.where(begins, start, -numpy.inf) + flat[first[:running]]
    pointers = []
    for i in range(1, lengths[0]):
        running = int((lengths > i).sum())
        candidates = best[:running, :, None] + transitions
        pointers.append(candidates.argmax(axis=1))
        best[:running] = candidates.max(axis=1) + flat[first[:running] + i]
    last = best.argmax(axis=1)
    for i in range(lengths[0] - 1, -1, -1):
        running = int((lengths > i).sum())
        for sequence, tag in zip(order[:running], last[:running], strict=True):
            tags[sequence][i] = tag
        if i:
            last[:running] = pointers[i - 1][numpy.arange(running), last[:running]]
    return tags


def segment_probabilities(
    emissions: Sequence[numpy.ndarray],
    transitions: numpy.ndarray,
    start: numpy.ndarray,
    segments: Sequence[Sequence[tuple[int, int, int]]],
    temperature: float,
) -> list[list[float]]:
    """For each sequence's segments, (first token, token after the last, index of the label), how probable it is that
    just this is an entity: the share that the valid IOB2 sequences with it have of the weight of all.

    It is the forward-backward algorithm (Rabiner 1989), on all sequences at a time. emissions: for each sequence an
    array of shape (tokens, tags). All scores are divided by `temperature` (Guo et al. 2017).
    """
    probabilities: list[list[float]] = [[0.0] * len(some) for some in segments]
    order = sorted((i for i, some in enumerate(segments) if some), key=lambda i: -len(emissions[i]))
    if not order:
        return probabilities
    follows, begins = allowed_transitions(len(start))
    transitions = numpy.where(follows, transitions / temperature, IMPOSSIBLE)
    start = numpy.where(begins, start / temperature, IMPOSSIBLE)
    scores = numpy.concatenate([emissions[i] for i in order]).astype("float64") / temperature
    lengths = numpy.array([len(emissions[i]) for i in order])
    firsts = numpy.cumsum(lengths) - lengths
    forward, backward = scores.copy(), numpy.zeros_like(scores)
    forward[firsts] += start
    for i in range(1, lengths[0]):
        rows = firsts[lengths > i] + i
        forward[rows] += _log_sum_exp(forward[rows - 1][:, :, None] + transitions, axis=1)
    for i in range(lengths[0] - 2, -1, -1):
        rows = firsts[lengths > i + 1] + i
        onward = scores[rows + 1] + backward[rows + 1]
        backward[rows] = _log_sum_exp(transitions + onward[:, None, :], axis=2)
    every = _log_sum_exp(forward[firsts + lengths - 1], axis=1)
    for place, sequence in enumerate(order):
        for number, (first, last, label) in enumerate(segments[sequence]):
            tag, inside = 1 + 2 * label, 2 + 2 * label
            score = forward[firsts[place] + first, tag]
            for row in range(firsts[place] + first + 1, firsts[place] + last):
                score, tag = score + transitions[tag, inside] + scores[row, inside], inside
            if last < lengths[place]:
                row = firsts[place] + last
                score += _log_sum_exp(numpy.delete(transitions[tag] + scores[row] + backward[row], inside), axis=0)
            probabilities[sequence][number] = float(numpy.exp(min(score - every[place], 0.0)))
    return probabilities


def _log_sum_exp(scores: numpy.ndarray, axis: int) -> numpy.ndarray:
    largest = scores.max(axis=axis, keepdims=True)
    return numpy.log(numpy.exp(scores - largest).sum(axis=axis)) + largest.squeeze(axis)


def _entities(tags: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, token after the last, index of the label) of each entity in a valid sequence of tag ids."""
    start = 0
    for end in range(1, len(tags) + 1):
        if end == len(tags) or tags[end] == OUTSIDE or tags[end] % 2 == 1:
            if tags[start] != OUTSIDE:
                yield start, end, (tags[start] - 1) // 2
            start = end


def tag_sequences(doc: Doc) -> Iterator[list[tuple[int, int]]]:
    """The sequences of what gets a tag: (first token, token after the last) of each word as PAN-X has it.

    Left out are white space and what is an entity or blocked already; a sequence ends there, and at every empty line.
    """
    units: list[tuple[int, int]] = []
    for token in doc:
        if token.ent_iob in (1, 3) or (token.is_space and token.text.count("\n") > 1):
            if units:
                yield units
            units = []
        elif token.is_space:
            continue
        elif units and units[-1][1] == token.i and _is_one_word(doc[token.i - 1], token):
            units[-1] = units[-1][0], token.i + 1
        else:
            units.append((token.i, token.i + 1))
    if units:
        yield units


def _is_one_word(left: Token, right: Token) -> bool:
    """Whether PAN-X has adjacent tokens of spaCy's as one: it cuts at white space and at the punctuation around a word,
    but not at an elision (`dell'Italia`), a hyphen or another sign inside it, and not before an initial's period.
    """
    if left.whitespace_:
        return False
    last, first = left.text[-1], right.text[0]
    if last in APOSTROPHES and len(left) > 1 and left.text[-2].isalnum():
        return first.isalnum()
    if right.text == "." and len(left) == 1 and last.isalpha():
        # at the end of a text it is the sentence's
        return any(not token.is_space for token in right.doc[right.i + 1 : right.i + 3])
    if last in QUOTES and first in QUOTES:
        return QUOTES.issuperset(left.text + right.text)
    return last not in PUNCTUATION and first not in PUNCTUATION


def _unit_tag(tags: Sequence[int]) -> int:
    """The tag of a word from its tokens': missing if one is, else the first that is not O."""
    return MASKED if MASKED in tags else next((tag for tag in tags if tag != OUTSIDE), OUTSIDE)


def _blocked(doc: Doc) -> list[Span]:
    return [doc[token.i : token.i + 1] for token in doc if token.ent_iob == 3 and not token.ent_type]


def _grown(weights: FloatsXd, shape: tuple[int, ...], ops: Ops) -> FloatsXd:
    grown = ops.alloc(shape)
    grown[tuple(slice(size) for size in weights.shape)] = weights
    return grown
