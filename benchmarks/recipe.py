"""Train the model card's recipe in plain PyTorch and transformers: the baseline that this project is compared with.

    python -m benchmarks.recipe --data FOLDER --encoder assets/encoder-small

The encoder gets a linear layer with dropout on the first wordpiece of each word, as in transformers' examples of token
classification. The optimizer is Adam with the card's learning rate, which falls linearly to zero; as in transformers'
Trainer, all gradients together are clipped to a norm of 1. The recipe runs on the GPU if there is one.

It prints the card's table, one row after each epoch, and as its last line JSON with seqeval's F1 of the last weights as
fractions: `f1` on the validation sentences, `test_f1` on the test sentences.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from seqeval.metrics import f1_score
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
    logging,
    set_seed,
)

from scripts.common import one_sentence
from scripts.panx import SPLITS, Sentence, read_tsv, split_path, subset

# the order of PAN-X's tag ids; each tag's first weights depend on it
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
BATCH_SIZE = 24
MAX_GRADIENT_NORM = 1.0
IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


def encode(sentences: Iterable[Sentence], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Return each sentence's wordpieces and labels: a word's tag on its first wordpiece, IGNORED on all others."""
    encoded = []
    for sentence in sentences:
        pieces = tokenizer(list(sentence.words), is_split_into_words=True, truncation=True, max_length=512)
        labels, previous = [], None
        for word in pieces.word_ids():
            is_first = word is not None and word != previous
            labels.append(TAGS.index(sentence.tags[word]) if is_first else IGNORED)
            previous = word
        encoded.append({**pieces, "labels": labels})
    return encoded


def score(model: PreTrainedModel, batches: Iterable[BatchEncoding]) -> tuple[float, float]:
    """Return the cross-entropy in nats per word, and seqeval's F1 as a fraction."""
    model.eval()
    total, gold, predicted = 0.0, [], []
    with torch.inference_mode():
        for batch in batches:
            output, labels = model(**batch), batch["labels"]
            total += output.loss.item() * int((labels != IGNORED).sum())
            for row, guesses in zip(labels, output.logits.argmax(dim=-1), strict=True):
                gold.append([TAGS[tag] for tag in row[row != IGNORED]])
                predicted.append([TAGS[tag] for tag in guesses[row != IGNORED]])
    return total / sum(map(len, gold)), f1_score(gold, predicted)


def train(
    encoder: Path, splits: dict[str, Sequence[Sentence]], seed: int, epochs: int, learning_rate: float
) -> dict[str, float]:
    """Train on a split, print the table and return both F1 scores of the last weights as fractions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    encoded = {split: encode(sentences, tokenizer) for split, sentences in splits.items()}
    collate = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)

    def batches(split: str, order: Sequence[int] | None = None) -> Iterator[BatchEncoding]:
        order = range(len(encoded[split])) if order is None else order
        for start in range(0, len(order), BATCH_SIZE):
            yield collate([encoded[split][i] for i in order[start : start + BATCH_SIZE]]).to(device)

    model = AutoModelForTokenClassification.from_pretrained(encoder, num_labels=len(TAGS))
    # a new head, so that its weights depend on the seed alone and not on what loading draws
    set_seed(seed)
    model.classifier = nn.Linear(model.config.hidden_size, len(TAGS))
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)
    steps = -(-len(encoded["train"]) // BATCH_SIZE)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps * epochs)
    print("| Training Loss | Epoch | Step | Validation Loss | F1 |\n|---|---|---|---|---|", flush=True)
    for epoch in range(1, epochs + 1):
        model.train()
        losses = []
        for batch in batches("train", numpy.random.permutation(len(encoded["train"]))):
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        validation_loss, f1 = score(model, batches("validation"))
        row = f"{statistics.mean(losses):.4f} | {epoch} | {epoch * steps} | {validation_loss:.4f} | {f1:.4f}"
        print(f"| {row} |", flush=True)
    _, test_f1 = score(model, batches("test"))
    return {"f1": f1, "test_f1": test_f1}


def main(
    data: Annotated[Path, typer.Option(help="Folder of PAN-X as TSV files", exists=True)],
    encoder: Annotated[Path, typer.Option(help="Folder of the encoder", exists=True)],
    seed: Annotated[int, typer.Option(help="Seed of the head, the order of sentences and dropout")] = 42,
    train_size: Annotated[int, typer.Option("--train", help="Training sentences, 0 for all")] = 1680,
    validation_size: Annotated[int, typer.Option("--validation", help="Validation sentences, 0 for all")] = 840,
    test_size: Annotated[int, typer.Option("--test", help="Test sentences, 0 for all")] = 840,
    epochs: Annotated[int, typer.Option(help="Passes over the training sentences", min=1)] = 3,
    learning_rate: Annotated[float, typer.Option(help="Initial learning rate")] = 5e-5,
    lang: Annotated[str, typer.Option(help="Language of the files")] = "it",
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice if not set", min=1)] = None,
) -> None:
    """Train the model card's recipe and print its F1."""
    logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    with one_sentence():
        sizes = dict(zip(SPLITS, (train_size, validation_size, test_size), strict=True))
        splits = {split: subset(read_tsv(split_path(data, split, lang)), sizes[split], split) for split in SPLITS}
        figures: dict[str, Any] = {"seed": seed, "epochs": epochs, "learning_rate": learning_rate} | sizes
        figures |= train(encoder, splits, seed, epochs, learning_rate)
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
