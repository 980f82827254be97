"""What the wheel carries: the transformer layer and its pipes, the entity recognizer and the tokenizer.

Importing this package registers their functions. No file here imports another, so that a wheel can hold them side by
side.
"""

from pathlib import Path

import spacy
from spacy.language import Language

from scripts.pipeline import encoder, linear, pipes, token_ner, tokenizer, weights  # noqa: F401


def blank_pipeline(lang: str) -> Language:
    """Return an empty pipeline with the project's tokenizer."""
    return spacy.blank(lang, config={"nlp": {"tokenizer": {"@tokenizers": "panx_xlmr.Tokenizer.v2"}}})


def load_pipeline(model: str | Path, gpu_id: int = -1) -> Language:
    """Load a trained pipeline from a folder, or an installed package, on a GPU if `gpu_id` is 0 or more."""
    if gpu_id >= 0:
        spacy.require_gpu(gpu_id)
    return spacy.load(model)
