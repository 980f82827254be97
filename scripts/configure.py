"""Fill project.yml's hyperparameters into configs/xlmr.cfg and write the full config for `spacy train`."""

from pathlib import Path
from typing import Annotated

import typer
from spacy.tokens import DocBin
from spacy.util import load_config, load_model_from_config
from thinc.api import Config
from wasabi import msg

import scripts.train  # noqa: F401  registers what the config names
from scripts.common import UserError, one_sentence, replacing


def configure(
    template: Path,
    *,
    lang: str,
    encoder: Path,
    sentences: int,
    learning_rate: float,
    head_learning_rate_scale: float,
    batch_size: int,
    epochs: int,
    seed: int,
    letter_case: float,
    threshold: float,
    gpu_id: int,
) -> Config:
    """Return the training config for a number of training sentences, with every default filled in.

    Raises UserError for a hyperparameter out of range.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("epochs", epochs, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} is {value}, expected a whole number from {least} up; set --vars.{name}.")
    for name, value in (("learning_rate", learning_rate), ("head_learning_rate_scale", head_learning_rate_scale)):
        if not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}, expected a number above 0; set --vars.{name}.")
    for name, value in (("letter_case", letter_case), ("threshold", threshold)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}, expected a number from 0 to 1; set --vars.{name}.")
    steps_per_epoch = -(-sentences // batch_size)
    config = load_config(template, interpolate=False)
    config["nlp"]["lang"] = lang
    config["paths"]["encoder"] = str(encoder)
    config["system"]["seed"] = seed
    config["training"]["max_steps"] = steps_per_epoch * epochs
    config["training"]["eval_frequency"] = steps_per_epoch
    config["training"]["batcher"]["size"] = batch_size
    config["training"]["optimizer"]["learn_rate"]["initial_rate"] = learning_rate
    # a number: spaCy resolves the optimizer alone, without interpolation, in debug data and resume_training()
    config["training"]["optimizer"]["learn_rate"]["total_steps"] = steps_per_epoch * epochs
    config["training"]["optimizer"]["head_learning_rate_scale"] = head_learning_rate_scale
    config["corpora"]["train"]["augmenter"]["share"] = letter_case
    config["components"]["ner"]["threshold"] = threshold
    if gpu_id >= 0:
        config["system"]["gpu_allocator"] = "pytorch"
        config["components"]["transformer"]["model"]["mixed_precision"] = True
    return load_model_from_config(config, auto_fill=True).config


def count_docs(path: Path) -> int:
    """Return the number of Docs in a .spacy file. Raises UserError for another file."""
    try:
        return len(DocBin().from_disk(path))
    except Exception as error:  # zlib's, msgpack's or spaCy's
        raise UserError(f"{path}: not a readable DocBin ({error}); run `spacy project run convert` again.") from None


def main(
    template: Annotated[Path, typer.Argument(help="Config with the pipeline and the training", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Where the full config goes", show_default=False)],
    learning_rate: Annotated[float, typer.Option(help="The encoder's initial learning rate")],
    head_learning_rate_scale: Annotated[float, typer.Option(help="Multiple of it for the head")],
    batch_size: Annotated[int, typer.Option(help="Sentences per batch")],
    epochs: Annotated[int, typer.Option(help="Passes over the training sentences")],
    seed: Annotated[int, typer.Option(help="Seed of all random numbers")],
    letter_case: Annotated[float, typer.Option(help="Share of training texts whose letter case changes")],
    threshold: Annotated[float, typer.Option(help="Least probability of an entity")],
    lang: Annotated[str, typer.Option(help="spaCy's code of the language")],
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")],
    train: Annotated[Path, typer.Option(help="Training sentences")] = Path("corpus/train.spacy"),
    encoder: Annotated[Path, typer.Option(help="Folder of the encoder")] = Path("assets/encoder"),
) -> None:
    """Write the full training config from the template and the project's hyperparameters."""
    with one_sentence():
        config = configure(
            template,
            lang=lang,
            encoder=encoder,
            sentences=count_docs(train),
            learning_rate=learning_rate,
            head_learning_rate_scale=head_learning_rate_scale,
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            letter_case=letter_case,
            threshold=threshold,
            gpu_id=gpu_id,
        )
        config["paths"]["train"] = train.as_posix()
        with replacing(output) as path:
            config.to_disk(path)
        steps = config["training"]["max_steps"]
        by_hand = f"spacy train {output} --code scripts/train.py --output training --gpu-id {gpu_id}"
        msg.good(
            f"{output}: {steps} steps; `{by_hand}` runs it by hand; for N steps, add --training.max_steps N "
            "--training.optimizer.learn_rate.total_steps N"
        )


if __name__ == "__main__":
    typer.run(main)
