"""The transformer's pipe, and a pipe that frees its vectors."""

import itertools
from collections.abc import Callable, Iterable, Iterator

from spacy.language import Language
from spacy.tokens import Doc
from spacy_transformers.pipeline_component import DEFAULT_CONFIG, Transformer
from thinc.api import Model

FACTORY, CLEANER = "panx_xlmr_transformer_v1", "panx_xlmr_doc_cleaner_v1"
MAX_TOKENS = 8192  # tokens whose vectors a stream keeps in memory at a time


class PanxTransformer(Transformer):
    """spacy-transformers' pipe with streams in batches of bounded size."""

    def pipe(self, stream: Iterable[Doc], *, batch_size: int = 128) -> Iterator[Doc]:
        """Set the vectors of a stream in batches of at most `batch_size` Docs and about MAX_TOKENS tokens."""
        batch: list[Doc] = []
        for doc in stream:
            batch.append(doc)
            if len(batch) == batch_size or sum(map(len, batch)) >= MAX_TOKENS:
                yield from super().pipe(batch, batch_size=batch_size)
                batch = []
        yield from super().pipe(batch, batch_size=batch_size)


def make_transformer(
    nlp: Language, name: str, model: Model, set_extra_annotations: Callable, max_batch_items: int
) -> PanxTransformer:
    """Create the pipe from a config; see spacy_transformers.Transformer."""
    return PanxTransformer(nlp.vocab, model, set_extra_annotations, max_batch_items=max_batch_items, name=name)


class DocCleaner:
    """Drop a Doc's transformer vectors to save memory, unless a pipe behind this one listens to the transformer."""

    def __init__(self, nlp: Language, name: str) -> None:
        self.nlp, self.name = nlp, name

    def __call__(self, doc: Doc) -> Doc:
        """Set `doc._.trf_data` to None."""
        pipes = dict(self.nlp.pipeline)
        listening = {name for pipe in pipes.values() for name in getattr(pipe, "listening_components", ())}
        if listening.isdisjoint(itertools.dropwhile(lambda name: name != self.name, pipes)):
            doc._.trf_data = None
        return doc


if not Language.has_factory(FACTORY):  # another package of this format may have registered them
    Language.factory(
        FACTORY, assigns=["doc._.trf_data"], default_config=DEFAULT_CONFIG["transformer"], func=make_transformer
    )
    Language.factory(CLEANER, func=DocCleaner)
