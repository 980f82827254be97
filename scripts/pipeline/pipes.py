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
        tokens = 0
        for doc in stream:
            batch.append(doc)
            tokens += len(doc)
            if len(batch) == batch_size or tokens >= MAX_TOKENS:
                yield from super().pipe(batch, batch_size=batch_size)
                batch, tokens = [], 0
        yield from super().pipe(batch, batch_size=batch_size)


def make_transformer(
    nlp: Language, name: str, model: Model, set_extra_annotations: Callable, max_batch_items: int
) -> PanxTransformer:
    """Create the pipe from a config; see spacy_transformers.Transformer."""
    return PanxTransformer(nlp.vocab, model, set_extra_annotations, max_batch_items=max_batch_items, name=name)


class DocCleaner:
    """Drop a Doc's transformer vectors to save memory, unless a pipe behind this one listens to the transformer."""

    def __init__(self, nlp: Language, name: str) -> None:
        self.nlp = nlp

    def __call__(self, doc: Doc) -> Doc:
        """Remove `doc._.trf_data`; its value is None then."""
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

        A listener that is in no pipe of `nlp` belongs to another pipeline, which got this pipe by `source=nlp`.
        """
        pipes = [pipe for _, pipe in self.nlp.components]
        behind = list(itertools.dropwhile(lambda pipe: pipe is not self, (pipe for _, pipe in self.nlp.pipeline)))
        ahead = [getattr(pipe, "model", None) for pipe in pipes if pipe not in behind]
        known = {id(node) for model in ahead if isinstance(model, Model) for node in model.walk()}
        return all(id(listener) in known for pipe in pipes for listener in getattr(pipe, "listeners", ()))


if not Language.has_factory(FACTORY):  # another package of this format may have registered them
    Language.factory(
        FACTORY, assigns=["doc._.trf_data"], default_config=DEFAULT_CONFIG["transformer"], func=make_transformer
    )
    Language.factory(CLEANER, func=DocCleaner)
