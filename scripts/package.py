"""Makes of a trained pipeline what `spacy package` packs: a full meta.json, a config that needs no file of ours."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jinja2
import spacy
import srsly
import typer
from spacy.util import load_config
from thinc.api import Config
from wasabi import msg

from scripts.clean import package_folder, remove
from scripts.common import UserError, link_or_copy, one_sentence, replacing
from scripts.evaluate import weights_digest

LABELS = {"PER": "people", "ORG": "organisations", "LOC": "places"}
TRAINING_SECTIONS = ("paths", "system", "corpora", "training", "initialize")


def inference_config(config: Config, encoder: str) -> Config:
    """The pipeline's config with spaCy's defaults in place of the training that made it.

    The training names functions and files of this project that an installed package does not have, so that
    `nlp.resume_training()` would fail. encoder: what the transformer is called in place of the folder it came from.
    """
    config = config.copy()
    transformer = config["components"]["transformer"]["model"]
    transformer["name"] = encoder
    # autocast is for CUDA only and warns on a CPU, where most installations run
    transformer["mixed_precision"] = False
    defaults = spacy.blank(config["nlp"]["lang"]).config
    for section in TRAINING_SECTIONS:
        config[section] = defaults[section]
    return config


def make_meta(
    template: dict[str, Any],
    *,
    lang: str,
    name: str,
    version: str,
    provenance: dict[str, Any],
    test: dict[str, Any],
    raw_text: dict[str, Any],
) -> dict[str, Any]:
    """meta.json's fields: the template's, the package's name, its sources, and its figures on the test sentences.

    template: configs/meta.json, whose `sources` say what is known of a source. provenance: assets/provenance.json.
    test: what `spacy evaluate --gold-preproc` wrote. raw_text: what scripts/evaluate.py wrote. Raises UserError for the
    figures of a pipeline that finds nothing.
    """
    if not test.get("ents_f") or not test.get("ents_per_type"):
        raise UserError(
            f"metrics/test.json: ents_f is {test.get('ents_f')}, so the pipeline finds no entity that is right; train "
            "on more sentences or for longer (--vars.train_size, --vars.epochs) before packaging it."
        )
    performance = {key: test[key] for key in ("ents_f", "ents_p", "ents_r", "ents_per_type")}
    performance |= {f"raw_text_{key}": raw_text[key] for key in ("ents_f", "ents_p", "ents_r")}
    records = [provenance["data"], *provenance["extra_train"], provenance["encoder"]]
    sources = [_source(record, template["sources"]) for record in records]
    own = {"lang": lang, "name": name, "version": version, "sources": sources, "performance": performance}
    return template | own


def _source(record: dict[str, Any], known: dict[str, dict[str, str]]) -> dict[str, str]:
    source = known.get(record["source"], {"name": record["source"], "license": "unknown"})
    config = {"config": record["config"]} if record.get("config") else {}
    commit = {"commit": record["commit"]} if record["commit"] else {}
    return source | config | commit


def hyperparameters(config: Config) -> list[tuple[str, object]]:
    """Names and values of what decided the training, from the config that it ran with."""
    training = config["training"]
    optimizer = training["optimizer"]
    epochs = training["max_steps"] / training["eval_frequency"]
    adam = ", ".join(f"{optimizer[key]:g}" for key in ("beta1", "beta2", "eps"))
    return [
        ("learning rate, falling in a line to 0", f"{optimizer['learn_rate']['initial_rate']:g}"),
        ("rate of the head, times that", f"{optimizer['head_learning_rate_scale']:g}"),
        ("batch size", training["batcher"]["size"]),
        ("epochs", f"{epochs:g}"),
        ("steps", training["max_steps"]),
        ("optimizer", f"AdamW ({adam}), weight decay {optimizer['weight_decay']:g}"),
        ("largest norm of a parameter's gradient", f"{optimizer['grad_clip']:g}"),
        ("dropout in the head", f"{training['dropout']:g}"),
        ("seed", training["seed"]),
    ]


def whole_training(path: Path, config: Config) -> list[dict[str, Any]]:
    """The rows of metrics/training.jsonl, of the training that the interpolated config describes.

    Raises UserError where they end before that training does: another one was stopped since.
    """
    steps = config["training"]["max_steps"]
    try:
        rows = list(srsly.read_jsonl(path))
    except ValueError:  # cut off in the middle of a line
        rows = []
    last = rows[-1]["step"] if rows else 0
    if last != steps:
        raise UserError(
            f"{path}: ends at step {last}, expected {steps}, where the pipeline's training ended; a training was "
            "stopped since: run `spacy project run all` again."
        )
    return rows


def model_card(template: str, **facts: Any) -> str:
    """README.md of the package, in Markdown. Raises jinja2.UndefinedError for a fact that the template names and that
    is missing.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        **facts, labels=LABELS, percent=lambda fraction: f"{fraction * 100:.2f}"
    )


def sources_licences(sources: Sequence[dict[str, str]]) -> str:
    """LICENSES_SOURCES of the package: what it was made from, and under which licences that is."""
    entries = []
    for source in sources:
        lines = [source["name"], f"Licence: {source['license']}"]
        entries.append("\n".join([*lines, *(source[key] for key in ("author", "url") if source.get(key))]))
    return "\n\n".join(entries) + "\n"


def prepare_package(model: Path, output: Path, meta: dict[str, Any], encoder: str, documents: dict[str, str]) -> None:
    """Writes the folder `output`: the trained pipeline `model` with that meta.json, an inference config, and documents.

    documents: text by file name. The weights are hard links where the file system has them, so that a large encoder is
    not stored twice.
    """
    with replacing(output) as folder:
        shutil.copytree(model, folder, copy_function=link_or_copy)
        config = inference_config(load_config(model / "config.cfg"), encoder)
        # a link must not be written through: it is the trained pipeline's own file
        for name in ("config.cfg", "meta.json"):
            (folder / name).unlink()
        config.to_disk(folder / "config.cfg")
        srsly.write_json(folder / "meta.json", meta)
        for name, text in documents.items():
            (folder / name).write_text(text, encoding="utf8")


def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for `spacy package`", show_default=False)],
    slim: Annotated[bool, typer.Argument(help="Whether the slim step dropped wordpieces", show_default=False)],
    lang: Annotated[str, typer.Option(help="First part of the package's name")],
    name: Annotated[str, typer.Option(help="Second part of the package's name")],
    version: Annotated[str, typer.Option(help="The package's version")],
    metrics: Annotated[Path, typer.Option(help="Folder with the figures")] = Path("metrics"),
    provenance: Annotated[Path, typer.Option(help="Where data and encoder came from")] = Path("assets/provenance.json"),
) -> None:
    """Write a trained pipeline's metadata and make it independent of the project, for `spacy package`."""
    with one_sentence():
        build = package_folder(lang, name, version)
        origin = srsly.read_json(provenance)
        raw_text = srsly.read_json(metrics / "raw_text.json")
        if raw_text.get("weights") != weights_digest(model):
            raise UserError(
                f"{metrics / 'raw_text.json'}: the figures are of other weights than {model} has; run "
                "`spacy project run evaluate` again."
            )
        test = srsly.read_json(metrics / "test.json")
        own = make_meta(
            srsly.read_json("configs/meta.json"),
            lang=lang,
            name=name,
            version=version,
            provenance=origin,
            test=test,
            raw_text=raw_text,
        )
        config = load_config(model / "config.cfg").interpolate()
        meta = srsly.read_json(model / "meta.json") | own
        card = model_card(
            Path("configs/model_card.md").read_text(encoding="utf8"),
            meta=meta,
            test=test,
            raw_text=raw_text,
            training=whole_training(metrics / "training.jsonl", config),
            stats=srsly.read_json("corpus/stats.json"),
            temperature=srsly.read_json(model / "ner" / "cfg").get("temperature", 1.0),
            hyperparameters=hyperparameters(config),
            slim=slim,
            panx=origin["data"]["config"].startswith("PAN-X"),
        )
        documents = {
            "README.md": card,
            "LICENSE": Path("LICENSE").read_text(encoding="utf8"),
            "LICENSES_SOURCES": sources_licences(meta["sources"]),
        }
        prepare_package(model, output, meta, origin["encoder"]["source"], documents)
        # an earlier build's files would go into the wheel again where they are newer than the pipeline's
        remove(build)
        msg.good(
            f"{output}: {lang}_{name} {version}, F1 {meta['performance']['ents_f'] * 100:.2f} on the test sentences"
        )


if __name__ == "__main__":
    typer.run(main)
