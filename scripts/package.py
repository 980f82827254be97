"""Prepare a trained pipeline for `spacy package`: meta.json, a config without project files, model card, licences."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jinja2
import spacy
import srsly
import typer
from spacy.util import get_lang_class, load_config
from thinc.api import Config
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.evaluate import weights_digest

LABELS = {"PER": "people", "ORG": "organisations", "LOC": "places"}
# the parts of a wheel's name, which is also the name of a folder that `package` removes
NAMES = {
    "lang": (r"[a-z]{2,3}", "a code of two or three letters"),
    "name": (r"[a-z][a-z0-9_]*", "lower-case letters, digits and _, a letter first"),
    "version": (r"[0-9]+(\.[0-9]+){2,}((a|b|rc|\.post|\.dev)[0-9]+)*", "a version of three numbers such as 1.0.0"),
}
TRAINING_SECTIONS = ("paths", "system", "corpora", "training", "initialize")


def check_names(lang: str, name: str, version: str) -> None:
    """Raise UserError for a part of the package's name that is not valid in a wheel's name, or an unknown language."""
    for key, value in (("lang", lang), ("name", name), ("version", version)):
        pattern, expected = NAMES[key]
        if not re.fullmatch(pattern, value):
            raise UserError(f"{key} is {value!r}, expected {expected}; set --vars.{key}.")
    try:
        get_lang_class(lang)
    except ImportError:
        raise UserError(f"lang is {lang!r}, which spaCy does not know; set --vars.lang.") from None


def inference_config(config: Config, encoder: str) -> Config:
    """Return the pipeline's config with spaCy's defaults for training.

    The project's training names functions and files that an installed package does not have, so that
    `nlp.resume_training()` would fail. encoder: the transformer's name, which replaces a local folder.
    """
    config = config.copy()
    transformer = config["components"]["transformer"]["model"]
    transformer["name"] = encoder
    transformer["mixed_precision"] = False
    defaults = spacy.blank(config["nlp"]["lang"]).config
    for section in TRAINING_SECTIONS:
        config[section] = defaults[section]
    return config


def make_meta(
    template: dict[str, Any],
    provenance: dict[str, Any],
    test: dict[str, Any],
    raw_text: dict[str, Any],
    running: bool = False,
    **names: str,
) -> dict[str, Any]:
    """Return meta.json: the template's fields, the package's name, its sources and its figures on the test sentences.

    template: configs/meta.json. running: whether the running corpus was trained on. names: lang, name and version.
    Raises UserError for the figures of a pipeline that finds nothing.
    """
    if not test.get("ents_f") or not test.get("ents_per_type"):
        raise UserError(
            f"metrics/test.json: ents_f is {test.get('ents_f')}, the pipeline finds no entity that is right; train "
            "on more sentences or for longer (--vars.train_size, --vars.epochs) before packaging it."
        )
    performance = {key: test[key] for key in ("ents_f", "ents_p", "ents_r", "ents_per_type")}
    performance |= {f"raw_text_{key}": raw_text[key] for key in ("ents_f", "ents_p", "ents_r")}
    further = [{"source": "running"}] if running else []
    sources = []
    for record in [provenance["data"], *provenance["extra_train"], *further, provenance["encoder"]]:
        known = template["sources"].get(record["source"], {"name": record["source"], "license": "unknown"})
        sources.append(known | {key: record[key] for key in ("config", "commit") if record.get(key)})
    return template | names | {"sources": sources, "performance": performance}


def sources_licences(sources: Sequence[dict[str, str]]) -> str:
    """Return LICENSES_SOURCES of the package: its sources and their licences."""
    entries = []
    for source in sources:
        lines = [source["name"], f"Licence: {source['license']}"]
        entries.append("\n".join([*lines, *(source[key] for key in ("author", "url") if source.get(key))]))
    return "\n\n".join(entries) + "\n"


@one_sentence()
def main(
    model: Annotated[Path, typer.Argument(help="Trained pipeline", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder for `spacy package`", show_default=False)],
    slim: Annotated[bool, typer.Argument(help="Whether the slim step dropped wordpieces", show_default=False)],
    lang: Annotated[str, typer.Option(help="First part of the package's name")],
    name: Annotated[str, typer.Option(help="Second part of the package's name")],
    version: Annotated[str, typer.Option(help="The package's version")],
) -> None:
    """Write a trained pipeline's metadata and make it independent of the project, for `spacy package`."""
    names = {"lang": lang, "name": name, "version": version}
    check_names(**names)
    test, raw_text, running = (srsly.read_json(f"metrics/{file}.json") for file in ("test", "raw_text", "running"))
    if raw_text.get("weights") != weights_digest(model):
        raise UserError(
            f"metrics/raw_text.json: these figures belong to other weights than {model}; run "
            "`spacy project run evaluate` again."
        )
    origin, stats = srsly.read_json("assets/provenance.json"), srsly.read_json("corpus/stats.json")
    times = stats.get("running", {}).get("times", 0)
    own = make_meta(srsly.read_json("configs/meta.json"), origin, test, raw_text, times > 0, **names)
    meta = srsly.read_json(model / "meta.json") | own
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    card = environment.from_string(Path("configs/model_card.md").read_text(encoding="utf8")).render(
        labels=LABELS,
        percent=lambda fraction: f"{fraction * 100:.2f}",
        meta=meta,
        test=test,
        raw_text=raw_text,
        running=running,
        further=bool(origin["extra_train"]),
        times=times,
        training=list(srsly.read_jsonl("metrics/training.jsonl")),
        stats=stats,
        temperature=srsly.read_json(model / "ner" / "cfg")["temperature"],
        least=load_config(model / "config.cfg")["components"]["ner"]["threshold"],
        config=load_config("training/config.cfg").interpolate(),
        slim=slim,
        panx=origin["data"]["config"].startswith("PAN-X"),
    )
    documents = {
        "README.md": card,
        "LICENSE": Path("LICENSE").read_text(encoding="utf8"),
        "LICENSES_SOURCES": sources_licences(meta["sources"]),
    }
    with replacing(output) as folder:
        shutil.copytree(model, folder)
        config = inference_config(load_config(model / "config.cfg"), origin["encoder"]["source"])
        config.to_disk(folder / "config.cfg")
        srsly.write_json(folder / "meta.json", meta)
        for file, text in documents.items():
            (folder / file).write_text(text, encoding="utf8")
    msg.good(f"{output}: {lang}_{name} {version}, F1 {meta['performance']['ents_f'] * 100:.2f} on the test sentences")


if __name__ == "__main__":
    typer.run(main)
