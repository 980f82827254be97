"""Fill project.yml's hyperparameters into configs/xlmr.cfg and write the full config for `spacy train`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from spacy.tokens import DocBin
from spacy.util import load_config, load_model_from_config
from thinc.api import Config
from wasabi import msg

import scripts.train  # noqa: F401  registers what the config names
from scripts.common import UserError, one_sentence, replacing

# where a variable goes in the config
SETTINGS = {
    "lang": "nlp.lang",
    "encoder": "paths.encoder",
    "seed": "system.seed",
    "batch_size": "training.batcher.size",
    "learning_rate": "training.optimizer.learn_rate.initial_rate",
    "head_learning_rate_scale": "training.optimizer.head_learning_rate_scale",
    "encoder_dropout": "components.transformer.model.transformer_config.hidden_dropout_prob",
    "letter_case": "corpora.train.augmenter.share",
    "threshold": "components.ner.threshold",
}


def configure(template: Path, *, sentences: int, epochs: int, gpu_id: int, **variables: Any) -> Config:
    """Return the training config for a number of training sentences, with every default filled in.

    variables: by their keys in SETTINGS; the last three may be left out. Raises UserError for one out of range.
    """
    batch_size, seed = variables["batch_size"], variables["seed"]
    for name, value, least in (("batch_size", batch_size, 1), ("epochs", epochs, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} is {value}, expected a whole number from {least} up; set --vars.{name}.")
    for name in ("learning_rate", "head_learning_rate_scale"):
        if not 0 < variables[name] < float("inf"):
            raise UserError(f"{name} is {variables[name]}, expected a number above 0; set --vars.{name}.")
    for name in ("encoder_dropout", "letter_case", "threshold"):
        if not 0 <= variables.get(name, 0) <= 1:
            raise UserError(
                f"{name} is {variables[name]}, expected a number from 0 to 1; set --vars.{name}, "
                f"or --vars.full_{name} for `run full`."
            )
    steps_per_epoch = -(-sentences // batch_size)
    overrides = {SETTINGS[key]: str(value) if key == "encoder" else value for key, value in variables.items()}
    config = load_config(template, overrides, interpolate=False)
    config["training"]["max_steps"] = steps_per_epoch * epochs
    config["training"]["eval_frequency"] = steps_per_epoch
    # a number: spaCy resolves the optimizer alone, without interpolation, in debug data and resume_training()
    config["training"]["optimizer"]["learn_rate"]["total_steps"] = steps_per_epoch * epochs
    if gpu_id >= 0:
        config["system"]["gpu_allocator"] = "pytorch"
        config["components"]["transformer"]["model"]["mixed_precision"] = True
    return load_model_from_config(config, auto_fill=True).config


@one_sentence()
def main(
    template: Annotated[Path, typer.Argument(help="Config with the pipeline and the training", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Where the full config goes", show_default=False)],
    learning_rate: Annotated[float, typer.Option(help="The encoder's initial learning rate")],
    head_learning_rate_scale: Annotated[float, typer.Option(help="Multiple of it for the head")],
    batch_size: Annotated[int, typer.Option(help="Sentences per batch")],
    epochs: Annotated[int, typer.Option(help="Passes over the training sentences")],
    seed: Annotated[int, typer.Option(help="Seed of all random numbers")],
    encoder_dropout: Annotated[float, typer.Option(help="Dropout in the encoder")],
    letter_case: Annotated[float, typer.Option(help="Share of training texts whose letter case changes")],
    threshold: Annotated[float, typer.Option(help="Least probability of an entity")],
    lang: Annotated[str, typer.Option(help="spaCy's code of the language")],
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")],
) -> None:
    """Write the full training config from the template and the project's hyperparameters."""
    variables = {name: value for name, value in locals().items() if name not in ("template", "output")}
    config = configure(template, sentences=len(DocBin().from_disk("corpus/train.spacy")), **variables)
    with replacing(output) as path:
        config.to_disk(path)
    steps = config["training"]["max_steps"]
    by_hand = f"python -m spacy train {output} --code scripts/train.py --output training --gpu-id {gpu_id}"
    msg.good(
        f"{output}: {steps} steps; `{by_hand}` runs it by hand; for N steps, add --training.max_steps N "
        "--training.optimizer.learn_rate.total_steps N"
    )


if __name__ == "__main__":
    typer.run(main)
