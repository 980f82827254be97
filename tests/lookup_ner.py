"""Small pipelines: of rules, and with an entity recognizer that learns in a second, without a transformer."""

import zlib

import numpy
import spacy
from spacy.tokens import Doc
from spacy.training import Example
from thinc.api import Model

from scripts.pipeline.token_ner import crf_token_classifier

WIDTH = 8


def lookup_vectors():
    """Stands in for the transformer's listener: each distinct word has its own vector."""

    def vectors(doc):
        rows = [numpy.random.default_rng(zlib.crc32(t.text.encode())).normal(size=WIDTH) for t in doc]
        return numpy.asarray(rows, dtype="float32").reshape(len(doc), WIDTH)

    def forward(model, docs, is_train):
        return [vectors(doc) for doc in docs], lambda gradient: []

    return Model("lookup-vectors", forward, dims={"nO": WIDTH})


def ruler(names):
    """A pipeline of rules that knows the names; names: their labels."""
    nlp = spacy.blank("it")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": label, "pattern": name} for name, label in names.items()])
    return nlp


def pipeline():
    numpy.random.seed(0)
    nlp = spacy.blank("it")
    nlp.add_pipe("panx_xlmr_ner_v2", name="ner", config={"model": {"@architectures": "test.LookupTokenClassifier.v1"}})
    return nlp


@spacy.registry.architectures("test.LookupTokenClassifier.v1")
def lookup_token_classifier():
    return crf_token_classifier(lookup_vectors())


def example(nlp, words, tags, spaces=None):
    gold = Doc(nlp.vocab, words=words, ents=tags, spaces=spaces)
    return Example(Doc(nlp.vocab, words=words, spaces=spaces), gold)


def trained(nlp, steps=60):
    examples = [
        example(nlp, ["Anna", "Neri", "vive", "a", "Bari"], ["B-PER", "I-PER", "O", "O", "B-LOC"]),
        example(nlp, ["La", "Spezia", "e", "Ugo"], ["B-LOC", "I-LOC", "O", "B-PER"]),
    ]
    nlp.initialize(lambda: examples)
    learn(nlp, examples, steps)
    return examples


def learn(nlp, examples, steps=60):
    optimizer = nlp.resume_training()
    optimizer.learn_rate = 0.1
    for _ in range(steps):
        nlp.update(examples, sgd=optimizer)
