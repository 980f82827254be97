"""The entity recognizer `panx_xlmr_ner_v2`: one IOB2 tag per word and a CRF, on top of a shared transformer.

From a text to `doc.ents`: `tag_sequences` groups spaCy's tokens into words and sequences; the listener gives each word
the vector of its first token's first wordpiece; a linear layer turns vectors into scores of tags; `decode_iob2` finds
the best valid sequence; `segment_probabilities` says how likely each entity is.
From gold entities to the gradient: `gold_tags` reads a tag per token, `_word_tag` one per word;
`negative_log_likelihood` compares the sequences that agree with these tags with all valid ones.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from typing import Any

import numpy
import torch
from spacy import registry
from spacy.language import Language
from spacy.pipeline import TrainablePipe
from spacy.tokens import Doc, Span, Token
from spacy.training import Example, biluo_to_iob, validate_examples, validate_get_examples
from thinc.api import Dropout, Linear, Model, Ops, chain, torch2xp, with_array, xp2torch
from thinc.layers.resizable import resize_linear_weighted
from thinc.types import Floats1d, Floats2d
from transformers.file_utils import ModelOutput

FACTORY = "panx_xlmr_ner_v2"  # the number changes with the stored format
OUTSIDE = 0  # tag ids: O is 0, then B and I of each label in turn
MASKED = -1  # a missing tag: not annotated, or not aligned
PADDING = -2  # no tag: behind the end of a sequence
QUOTES = frozenset("'’\"`‘“”«»")
HYPHENS = frozenset("-\u2010\u2011")
JOINERS = frozenset("\u00ad\u200c\u200d")  # invisible characters inside words
IMPOSSIBLE = -1e4  # the score of a forbidden transition: finite, so that gradients are never nan


def _score(span: Span) -> float | None:
    label, probability = span._.get(SCORED) or (None, None)
    return probability if label == span.label_ else None


# spaCy keeps a span's extensions by character offsets only, so that the label is stored with the score
SCORED = "_panx_scored"
if not Span.has_extension(SCORED):  # another package may have set both
    if Span.has_extension("panx_score"):
        raise ValueError("The extension Span._.panx_score is the package's own; give yours another name.")
    Span.set_extension(SCORED, default=None)
    Span.set_extension("panx_score", getter=_score)


@dataclass
class TagScores:
    """The model's scores for a batch of Docs, as unnormalised log-probabilities, or their gradient.

    emissions: an array of shape (tokens, tags) per Doc. transitions: shape (tags, tags), from the row's tag to the
    column's. start: shape (tags,), for the first tag of a sequence.
    """

    emissions: list[Floats2d]
    transitions: Floats2d
    start: Floats1d


def _bert_init(ops: Ops, shape: tuple[int, ...]) -> numpy.ndarray:
    # as Devlin et al. 2019 initialise every linear layer; numpy's generator, because spaCy seeds it
    return ops.asarray(numpy.random.normal(scale=0.02, size=shape).astype("float32"))


@registry.architectures("panx_xlmr.CrfTokenClassifier.v2")
def crf_token_classifier(
    tok2vec: Model[list[Doc], list[Floats2d]], nO: int | None = None
) -> Model[list[Doc], TagScores]:
    """Build a linear-chain conditional random field (Lafferty, McCallum and Pereira 2001) on token vectors.

    Dropout and a linear layer score each token's tags; learned transitions, initially zero, score adjacent tags.
    tok2vec: returns an array of shape (tokens, width) per Doc. nO: the number of tags, set when the labels are known.
    """
    output_layer = Linear(nO, init_W=_bert_init)
    transitions = transition_scores(nO)
    model = chain(tok2vec, with_array(chain(Dropout(), output_layer)), transitions)
    model.set_ref("output_layer", output_layer)
    model.set_ref("transitions", transitions)
    return model


def transition_scores(nO: int | None) -> Model[list[Floats2d], TagScores]:
    """Add learned scores for the first tag and for adjacent tags, nO tags, to the tokens' scores."""
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


class TokenNer(TrainablePipe):
    """Set `doc.ents` from one IOB2 tag per word.

    The tags are the valid IOB2 sequence with the highest score (Viterbi decoding). White space has no tag: an entity
    may continue after a line break, but not after an empty line or a tab. As with spaCy's `ner`, entities and blocked
    tokens set by earlier pipes are kept, and only the tokens between them are labelled.

    `span._.panx_score` is the probability that an entity found by this pipe is right, boundaries and label included. It
    is None for every other span, also for one with the same boundaries and another label. An entity whose probability
    is below `threshold` is left out. The threshold with the highest F1 is about half of that F1 (Lipton et al. 2014).
    """

    def __init__(
        self, nlp: Language, name: str, model: Model[list[Doc], TagScores], threshold: float, scorer: Callable | None
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"The threshold of the pipe '{name}' is {threshold}, expected a probability from 0 to 1.")
        super().__init__(nlp.vocab, model, name, labels=[])
        self.threshold = threshold
        self.scorer = scorer

    @property
    def labels(self) -> tuple[str, ...]:
        """The entity labels, in the order of their tag ids."""
        return tuple(self.cfg["labels"])

    @property
    def label_data(self) -> tuple[str, ...]:
        """The labels, as `spacy init labels` stores them and `initialize(labels=…)` takes them."""
        return self.labels

    @property
    def tags(self) -> tuple[str, ...]:
        """The IOB2 tags, in the order of the columns of the scores."""
        return ("O", *(f"{prefix}-{label}" for label in self.labels for prefix in "BI"))

    def add_label(self, label: str) -> int:
        """Add an entity label, also to a trained pipe, and keep all other scores.

        Returns 1, or 0 if the label exists. Raises ValueError for anything but a non-empty string.
        """
        if not isinstance(label, str) or not label:
            raise ValueError(f"An entity label is a non-empty string, not {label!r}.")
        if label in self.labels:
            return 0
        self.cfg["labels"].append(label)
        self.vocab.strings.add(label)
        old, tags = self.model.get_ref("output_layer"), len(self.tags)
        if old.has_param("W"):  # thinc fixes the size of a layer that has weights, so replace it by a larger one
            scores, larger = self.model.get_ref("transitions"), transition_scores(tags)
            for name in ("transitions", "start"):
                larger.set_param(name, larger.ops.xp.pad(scores.get_param(name), (0, tags - scores.get_dim("nO"))))
            self.model.replace_node(scores, larger)
            self.model.replace_node(old, resize_linear_weighted(old, tags))
        return 1

    def initialize(
        self,
        get_examples: Callable[[], Iterable[Example]],
        *,
        nlp: Language | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Initialize the model with `labels`, or else with the examples' entity labels in alphabetical order.

        Raises ValueError if `get_examples` returns no examples or if there is no label.
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
        """Return the scores of each Doc's tags. Raises ValueError if the transformer has not read the Docs."""
        docs = list(docs)
        tok2vec, classify, transitions = self.model.layers
        if not any(len(doc) for doc in docs):
            return transitions.predict([self.model.ops.alloc2f(0, len(self.tags)) for _ in docs])
        if not (tok2vec.layers and tok2vec.layers[-1].name == "first-wordpieces"):
            return self.model.predict(docs)
        listener, first_wordpieces = tok2vec.layers
        unread = any(len(doc) and getattr(doc._, "trf_data", None) is None for doc in docs)
        if unread and listener.name == "transformer-listener":
            raise ValueError(
                f"The pipe '{self.name}' needs the transformer, which is disabled or has not run; run both."
            )
        batch = listener.predict(docs)
        full = [data for data in batch if data.model_output]  # the others' Docs have no tokens
        vectors = [data.model_output.last_hidden_state[0] for data in full]
        # a list is concatenated: fewer GPU kernels for many Docs, a second copy for one
        scores = classify.predict(vectors) if len(full) > 1 else [classify.predict(vectors[0])]
        both = zip(full, scores, strict=True)
        # scores in place of vectors, since the layer copies what it takes: of vectors, 600 MB for a text of 1 MB
        scored = [replace(data, model_output=ModelOutput(last_hidden_state=some[None])) for data, some in both]
        emissions = iter(first_wordpieces.predict(scored))
        empty = self.model.ops.alloc2f(0, len(self.tags))
        return transitions.predict([next(emissions) if data.model_output else empty for data in batch])

    def set_annotations(self, docs: Iterable[Doc], scores: TagScores) -> None:
        """Decode each Doc's scores and set its entities. Raises ValueError if a Doc's tokens have changed since."""
        docs = list(docs)
        if not docs:
            return
        if any(len(doc) != len(of_tokens) for doc, of_tokens in zip(docs, scores.emissions, strict=True)):
            raise ValueError(
                f"A pipe between the transformer and '{self.name}' merges or splits tokens; put it before the "
                f"transformer or after '{self.name}'."
            )
        sequences = [(number, words) for number, doc in enumerate(docs) for words in tag_sequences(doc)]
        # one array for all Docs: each copy from a GPU is a synchronisation
        arrays = self.model.ops.xp.concatenate(scores.emissions), scores.transitions, scores.start
        every, *parameters = map(self.model.ops.to_numpy, arrays)
        by_doc = numpy.split(every, numpy.cumsum([len(doc) for doc in docs])[:-1])
        emissions = [by_doc[number][[start for start, _ in words]] for number, words in sequences]
        segments = [list(_entities(tags)) for tags in decode_iob2(emissions, *parameters)]
        temperature = self.cfg.get("temperature", 1.0)  # set by scripts/calibrate.py
        probabilities = segment_probabilities(emissions, *parameters, segments, temperature)
        scored: list[dict[Span, float]] = [{} for _ in docs]
        for (number, words), some, likely in zip(sequences, segments, probabilities, strict=True):
            for (first, last, label), probability in zip(some, likely, strict=True):
                if probability >= self.threshold:
                    span = Span(docs[number], words[first][0], words[last - 1][1], label=self.labels[label])
                    scored[number][span] = probability
        for doc, spans in zip(docs, scored, strict=True):
            blocked = [doc[token.i : token.i + 1] for token in doc if token.ent_iob == 3 and not token.ent_type]
            doc.set_ents([*doc.ents, *spans], blocked=blocked)
            for span, probability in spans.items():
                span._.set(SCORED, (span.label_, probability))

    def get_loss(self, examples: Iterable[Example], scores: TagScores) -> tuple[float, TagScores]:
        """Return the negative log-likelihood of the gold tags, in nats per gold tag, and its gradient.

        A missing tag (not annotated, or not aligned with the gold tokens) may be any tag (Tsuboi et al. 2008). Raises
        ValueError for a gold label that the pipe does not have.
        """
        validate_examples(examples, "TokenNer.get_loss")
        lengths = [len(doc_scores) for doc_scores in scores.emissions]
        sequences = []  # pairs of a word's row among all Docs' tokens and its gold tag
        for example, end in zip(examples, accumulate(lengths), strict=True):
            tags = self.gold_tags(example)
            for words in tag_sequences(example.predicted):
                sequences.append([(end - len(tags) + start, _word_tag(tags[start:stop])) for start, stop in words])
        count = sum(tag != MASKED for pairs in sequences for _, tag in pairs)
        # the shape is given, since there may be no sequence
        shape = 2, len(sequences), max(map(len, sequences), default=0)
        padded = numpy.array([*zip_longest(*sequences, fillvalue=(0, PADDING))], dtype="int64").T.reshape(shape)
        arrays = self.model.ops.xp.concatenate(scores.emissions), scores.transitions, scores.start
        emissions, transitions, start = leaves = [xp2torch(array, requires_grad=True) for array in arrays]
        rows, gold = torch.from_numpy(padded.copy()).to(emissions.device)  # one copy to a GPU is faster than two
        of_words = emissions.index_select(0, rows.flatten()).view(*rows.shape, emissions.shape[1])
        loss = negative_log_likelihood(of_words, transitions, start, gold) / max(count, 1)
        gradients = [torch2xp(g) for g in torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]
        by_doc = self.model.ops.unflatten(gradients[0], numpy.array(lengths, dtype="int32"))
        return float(loss.detach()), TagScores(by_doc, *gradients[1:])

    def gold_tags(self, example: Example) -> list[int]:
        """Return the gold tag id of each token of `example.predicted`, MASKED where there is none."""
        ids = {tag: i for i, tag in enumerate(self.tags)}
        tags = biluo_to_iob(example.get_aligned_ner())
        try:
            return [MASKED if tag is None else ids[tag] for tag in tags]
        except KeyError as error:
            raise ValueError(
                f"The gold tag {error} has a label that the pipe '{self.name}' does not have "
                f"({', '.join(self.labels)}); add the label before training."
            ) from None

    def pipe(self, stream: Iterable[Doc], *, batch_size: int = 128) -> Iterator[Doc]:
        """Annotate a stream in batches of bounded size."""
        for docs in registry.misc.get("panx_xlmr.Batches.v1")(stream, batch_size):  # scripts/pipeline/pipes.py
            yield from super().pipe(docs, batch_size=len(docs))


if not Language.has_factory(FACTORY):  # another package of this format may have registered it
    Language.factory(
        FACTORY,
        assigns=["doc.ents", "token.ent_iob", "token.ent_type"],
        default_config={
            "model": {
                "@architectures": "panx_xlmr.CrfTokenClassifier.v2",
                "tok2vec": {"@architectures": "panx_xlmr.TransformerListener.v1"},
            },
            "threshold": 0.0,
            "scorer": {"@scorers": "spacy.ner_scorer.v1"},
        },
        default_score_weights={"ents_f": 1.0, "ents_p": 0.0, "ents_r": 0.0, "ents_per_type": None},
        func=TokenNer,
    )


def allowed_transitions(tags: int) -> numpy.ndarray:
    """Return which tags may follow which, booleans of shape (tags, tags). What may follow O may also begin a sequence.

    In IOB2, O and B- may stand anywhere, I- only after B- or I- of the same label.
    """
    follows = numpy.ones((tags, tags), dtype=bool)
    inside = numpy.arange(2, tags, 2)
    follows[:, inside] = False
    follows[inside, inside] = follows[inside - 1, inside] = True
    return follows


def negative_log_likelihood(
    emissions: torch.Tensor, transitions: torch.Tensor, start: torch.Tensor, gold: torch.Tensor
) -> torch.Tensor:
    """Return the sum over sequences of -log P(gold tags | valid IOB2 sequences), in nats.

    emissions: shape (sequences, longest, tags). gold: tag ids, shape (sequences, longest), MASKED where any tag will do
    and PADDING behind the end of a sequence, where emissions are ignored. The partition functions come from the forward
    algorithm (Rabiner 1989) over all sequences and over those that agree with the gold tags. Matrices of adjacent tags
    are multiplied in pairs, in the log semiring, so that the number of GPU kernels grows with the logarithm of the
    length.
    """
    if not gold.numel():
        return (emissions.sum() + transitions.sum() + start.sum()) * 0
    device, tags = start.device, len(start)
    follows = torch.from_numpy(allowed_transitions(tags)).to(device)
    exists = (gold != PADDING).repeat(2, 1)
    agrees = (gold[..., None] == MASKED) | (gold[..., None] == torch.arange(tags, device=device))
    scores = torch.cat([emissions, emissions.masked_fill(~agrees, IMPOSSIBLE)])
    # shape (sequences, length - 1, tags, tags): from each tag to each next one; the identity beyond the end
    steps = transitions.masked_fill(~follows, IMPOSSIBLE) + scores[:, 1:, None, :]
    identity = torch.full((tags, tags), IMPOSSIBLE, device=device).fill_diagonal_(0.0)
    steps = torch.where(exists[:, 1:, None, None], steps, identity)
    while steps.shape[1] > 1:
        if steps.shape[1] % 2:
            steps = torch.cat([steps, identity.expand(len(steps), 1, tags, tags)], dim=1)
        steps = torch.logsumexp(steps[:, ::2, :, :, None] + steps[:, 1::2, None, :, :], dim=3)
    forward = start.masked_fill(~follows[OUTSIDE], IMPOSSIBLE) + scores[:, 0]
    if steps.shape[1]:
        forward = torch.logsumexp(forward[:, :, None] + steps[:, 0], dim=1)
    every, agreeing = torch.logsumexp(forward, dim=1).chunk(2)
    return (every - agreeing).sum()


def _behind(
    scores: numpy.ndarray, lengths: numpy.ndarray, transitions: numpy.ndarray, add: numpy.ufunc
) -> numpy.ndarray:
    """Return what `add` makes of the scores of all that may follow each word with each tag, shape (words, tags).

    scores: those of sequences of `lengths`, one after the other. add: numpy.maximum (Viterbi decoding, Forney 1973) or
    numpy.logaddexp (the backward algorithm, Rabiner 1989). All sequences are run together, one word at a time.
    """
    firsts, behind = numpy.cumsum(lengths) - lengths, numpy.zeros_like(scores)
    for i in range(lengths.max() - 2, -1, -1):
        rows = firsts[lengths > i + 1] + i
        behind[rows] = add.reduce(transitions + (scores[rows + 1] + behind[rows + 1])[:, None, :], axis=2)
    return behind


def decode_iob2(
    emissions: Sequence[numpy.ndarray], transitions: numpy.ndarray, start: numpy.ndarray
) -> list[numpy.ndarray]:
    """Return the best valid IOB2 tag ids for each array of scores, shape (words, tags)."""
    if not emissions:
        return []
    lengths = numpy.array([len(scores) for scores in emissions])
    follows = allowed_transitions(len(start))
    transitions = numpy.where(follows, transitions, -numpy.inf)
    # as float64: the sum over a long text would lose small differences
    scores, firsts = numpy.concatenate(emissions).astype("float64"), numpy.cumsum(lengths) - lengths
    scores[firsts] += numpy.where(follows[OUTSIDE], start, -numpy.inf)
    best = scores + _behind(scores, lengths, transitions, numpy.maximum)
    tags = best.argmax(axis=1)  # right for first words; each other tag depends on the one before
    for i in range(1, lengths.max()):
        rows = firsts[lengths > i] + i
        tags[rows] = (transitions[tags[rows - 1]] + best[rows]).argmax(axis=1)
    return numpy.split(tags, firsts[1:])


def segment_probabilities(
    emissions: Sequence[numpy.ndarray],
    transitions: numpy.ndarray,
    start: numpy.ndarray,
    segments: Sequence[Sequence[tuple[int, int, int]]],
    temperature: float,
) -> list[list[float]]:
    """Return, for each sequence's segments, the probability that exactly this segment is an entity.

    A segment is (first word, word after the last, index of the label). Its probability is the share of the weight of
    all valid IOB2 sequences that have it, computed by the forward-backward algorithm. emissions: an array of shape
    (words, tags) per sequence. All scores are divided by `temperature` (Guo et al. 2017).
    """
    probabilities: list[list[float]] = [[] for _ in segments]
    having = [i for i, some in enumerate(segments) if some]
    if not having:
        return probabilities
    follows = allowed_transitions(len(start))
    transitions = numpy.where(follows, transitions / temperature, IMPOSSIBLE)
    scores = numpy.concatenate([emissions[i] for i in having]).astype("float64") / temperature
    lengths = numpy.array([len(emissions[i]) for i in having])
    firsts = numpy.cumsum(lengths) - lengths
    scores[firsts] += numpy.where(follows[OUTSIDE], start / temperature, IMPOSSIBLE)
    backward = _behind(scores, lengths, transitions, numpy.logaddexp)
    forward = scores + _behind(scores[::-1], lengths[::-1], transitions.T, numpy.logaddexp)[::-1]
    every = numpy.logaddexp.reduce(forward[firsts + lengths - 1], axis=1)
    for sequence, begin, length, total in zip(having, firsts, lengths, every, strict=True):
        for first, last, label in segments[sequence]:
            tag, inside = 1 + 2 * label, 2 + 2 * label
            score = forward[begin + first, tag]
            for row in range(begin + first + 1, begin + last):
                score, tag = score + transitions[tag, inside] + scores[row, inside], inside
            if last < length:
                onward = transitions[tag] + scores[begin + last] + backward[begin + last]
                score += numpy.logaddexp.reduce(numpy.delete(onward, inside))
            probabilities[sequence].append(float(numpy.exp(min(score - total, 0.0))))
    return probabilities


def _entities(tags: numpy.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (first word, word after the last, index of the label) of each entity in a valid sequence of tag ids."""
    for start in numpy.flatnonzero(tags % 2).tolist():  # B- tags are odd
        end = start + 1
        while end < len(tags) and tags[end] == tags[start] + 1:
            end += 1
        yield start, end, tags[start] // 2


def tag_sequences(doc: Doc) -> Iterator[list[tuple[int, int]]]:
    """Yield the sequences to tag: (first token, token after the last) of each word.

    White space, entities and blocked tokens are left out. A sequence ends at an entity, a blocked token, an empty line
    or a tab.
    """
    words: list[tuple[int, int]] = []
    text = doc.text
    for token in doc:
        if token.ent_iob in (1, 3) or (token.is_space and (token.text.count("\n") > 1 or "\t" in token.text)):
            if words:
                yield words
            words = []
        elif words and words[-1][1] == token.i and _is_one_word(doc[token.i - 1], token, text):
            words[-1] = words[-1][0], token.i + 1
        elif not token.is_space:
            words.append((token.i, token.i + 1))
    if words:
        yield words


def _is_one_word(left: Token, right: Token, text: str) -> bool:
    """Return whether adjacent tokens of a text are one word, as in PAN-X: `centro-nord`, `10km`, the initial `F.`

    Every other punctuation mark or symbol is a word, and so is an elided article: `dell'` + `Italia`.
    """
    if left.whitespace_:
        return False
    last, first = text[right.idx - 1], text[right.idx]
    if right.text == "." and len(left) == 1 and last.isalpha():
        # at the end of a text it is the sentence's
        return any(not token.is_space for token in right.doc[right.i + 1 : right.i + 3])
    if last in QUOTES and first in QUOTES:
        return QUOTES.issuperset(left.text + right.text)
    if first in HYPHENS:
        first = text[right.idx + 1 : right.idx + 2]
    elif last in HYPHENS:
        last = text[right.idx - 2 : right.idx - 1]
    return _in_word(last) and _in_word(first)


def _in_word(character: str) -> bool:
    """Return whether a character is a letter, a mark, a number or a joiner; False for an empty string.

    Numbers like those of footnotes (category No) are left out, and so are the selectors of a sign's variant (U+FE00 to
    U+FE0F): marks by category, they belong to the sign.
    """
    if character == "" or "\ufe00" <= character <= "\ufe0f":
        return False
    category = unicodedata.category(character)
    return (category[0] in "LMN" and category != "No") or character in JOINERS


def _word_tag(tags: Sequence[int]) -> int:
    """Return a word's tag: missing if one of its tokens' is, else the first that is not O."""
    return MASKED if MASKED in tags else next((tag for tag in tags if tag != OUTSIDE), OUTSIDE)
