"""The transformer's pipe, a layer that listens to it, and a pipe that frees its vectors."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy
from spacy import registry
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy_transformers.data_classes import TransformerData
from spacy_transformers.layers import TransformerListener
from spacy_transformers.pipeline_component import DEFAULT_CONFIG, Transformer
from thinc.api import Model, chain
from thinc.types import Floats2d
from transformers.file_utils import ModelOutput

FACTORY, CLEANER = "panx_xlmr_transformer_v1", "panx_xlmr_doc_cleaner_v1"
MAX_TOKENS = 8192  # tokens whose vectors a stream keeps in memory at a time


@registry.misc("panx_xlmr.Batches.v1")
def batches(stream: Iterable[Doc], size: int) -> Iterator[list[Doc]]:
    """Yield batches of up to `size` Docs and MAX_TOKENS tokens, or one Doc, so that a stream's memory is bounded."""
    batch, tokens = [], 0
    for doc in stream:
        if batch and tokens + len(doc) > MAX_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(doc)
        tokens += len(doc)
        if len(batch) == size or tokens >= MAX_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


class PanxTransformer(Transformer):
    """spacy-transformers' pipe with streams in batches of bounded size."""

    def __init__(
        self, nlp: Language, name: str, model: Model, set_extra_annotations: Callable, max_batch_items: int
    ) -> None:
        super().__init__(nlp.vocab, model, set_extra_annotations, name=name, max_batch_items=max_batch_items)

    def update(
        self, examples: Iterable[Example], *, losses: dict[str, float] | None = None, **settings: Any
    ) -> dict[str, float]:
        """Update the model; also log the loss of texts without a token, as spaCy's pipes do and its loggers expect."""
        losses = {} if losses is None else losses
        losses.setdefault(self.name, 0.0)
        return super().update(examples, losses=losses, **settings)

    def pipe(self, stream: Iterable[Doc], *, batch_size: int = 128) -> Iterator[Doc]:
        """Set the vectors of a stream in batches of bounded size."""
        for docs in batches(stream, batch_size):
            yield from super().pipe(docs, batch_size=len(docs))


@registry.architectures("panx_xlmr.TransformerListener.v1")
def transformer_listener(upstream: str = "*") -> Model[list[Doc], list[Floats2d]]:
    """Listen to the transformer pipe `upstream`, or to any, and return the vector of each token's first wordpiece."""
    return chain(TransformerListener(upstream), first_wordpieces())


@registry.layers("panx_xlmr.FirstWordpieces.v1")
def first_wordpieces() -> Model[list[TransformerData], list[Floats2d]]:
    """Return the vector of each token's first wordpiece, an array of shape (tokens, width) per Doc.

    It equals spacy-transformers' pooling with `reduce_first`, which copies the vectors of all wordpieces twice, Doc by
    Doc. Every token must have a wordpiece.
    """
    return Model("first-wordpieces", _forward_first)


def _forward_first(
    model: Model, batch: list[TransformerData], is_train: bool
) -> tuple[list[Floats2d], Callable[[list[Floats2d]], list[TransformerData]]]:
    ops = model.ops
    full = [data for data in batch if "last_hidden_state" in data.model_output]  # the others' Docs have no tokens
    if not full:
        return [ops.alloc2f(0, 0) for _ in batch], lambda gradients: []
    arrays = [data.model_output.last_hidden_state.reshape(-1, data.width) for data in full]
    lengths = [ops.to_numpy(data.align.lengths) for data in full]
    before = numpy.cumsum([0, *(len(array) for array in arrays)])  # a Doc's first row among all Docs' vectors
    firsts = [
        ops.to_numpy(data.align.dataXd)[numpy.cumsum(some) - some] + start
        for data, some, start in zip(full, lengths, before[:-1], strict=True)
    ]
    rows = ops.asarray(numpy.concatenate(firsts))  # one copy to a GPU
    # one Doc's vectors are not copied: they may be those of a book
    vectors = arrays[0] if len(arrays) == 1 else ops.xp.concatenate(arrays)
    shape = vectors.shape
    found = iter(ops.unflatten(vectors[rows], numpy.array([len(some) for some in lengths])))
    outputs = [next(found) if "last_hidden_state" in data.model_output else ops.alloc2f(0, 0) for data in batch]

    def backprop(gradients: list[Floats2d]) -> list[TransformerData]:
        flat = ops.alloc2f(*shape)
        ops.scatter_add(flat, rows, ops.xp.concatenate([gradient for gradient in gradients if len(gradient)]))
        shapes = [data.model_output.last_hidden_state.shape for data in full]
        parts = [flat[a:b].reshape(some) for a, b, some in zip(before[:-1], before[1:], shapes, strict=True)]
        return [
            replace(data, model_output=ModelOutput(last_hidden_state=p)) for data, p in zip(full, parts, strict=True)
        ]

    return outputs, backprop


class DocCleaner:
    """Drop a Doc's transformer vectors to save memory, unless a pipe behind this one listens to the transformer."""

    def __init__(self, nlp: Language, name: str) -> None:
        self.nlp = nlp

    def __call__(self, doc: Doc) -> Doc:
        """Remove `doc._.trf_data`; it is then None."""
        return next(self.pipe([doc]))

    def pipe(self, stream: Iterable[Doc], *, batch_size: int = 128) -> Iterator[Doc]:
        """Remove `doc._.trf_data` of each Doc of a stream."""
        done = self._all_have_read()
        for doc in stream:
            if done:
                # deleted, not None: Doc.from_docs() warns about every extension that has a value
                doc.user_data.pop(("._.", "trf_data", None, None), None)
            yield doc

    def _all_have_read(self) -> bool:
        """Return whether each listener is in a pipe that has run, or is disabled.

        A listener that is in no pipe of `nlp` is in another pipeline, which sourced this transformer: it still reads.
        """
        pipes = [pipe for _, pipe in self.nlp.components]
        behind = list(itertools.dropwhile(lambda pipe: pipe is not self, (pipe for _, pipe in self.nlp.pipeline)))
        ahead = [getattr(pipe, "model", None) for pipe in pipes if pipe not in behind]
        known = {id(node) for model in ahead if isinstance(model, Model) for node in model.walk()}
        return all(id(listener) in known for pipe in pipes for listener in getattr(pipe, "listeners", ()))


if not Language.has_factory(FACTORY):  # another package of this format may have registered them
    Language.factory(
        FACTORY, assigns=["doc._.trf_data"], default_config=DEFAULT_CONFIG["transformer"], func=PanxTransformer
    )
    Language.factory(CLEANER, func=DocCleaner)
