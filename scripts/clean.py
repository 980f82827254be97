"""Removes what the project's commands have made; the one place that removes folders named by project.yml's vars."""

import re
import shutil
from pathlib import Path
from typing import Annotated

import typer
from wasabi import msg

from scripts.common import UserError, one_sentence

MADE = ("assets", "training", "metrics", "build")
CORPUS = ("train.spacy", "dev.spacy", "test.spacy", "stats.json")
# what can be part of the name of a Python package and of its wheel, and cannot lead out of a folder
NAMES = {
    "lang": (r"[a-z]{2,3}", "a code of two or three letters from a to z"),
    "name": (r"[a-z][a-z0-9_]*", "letters from a to z, digits and _, a letter first"),
    "version": (r"[0-9]+(\.[0-9]+)*((a|b|rc|\.post|\.dev)[0-9]+)*", "a version as Python packages have it, like 1.0.0"),
}


def package_folder(lang: str, name: str, version: str) -> Path:
    """The folder in which `spacy package` builds, below the project's folder. Raises UserError for a part of its name
    that could mean another folder, or that no package can have.
    """
    for key, value in {"lang": lang, "name": name, "version": version}.items():
        pattern, expected = NAMES[key]
        if not re.fullmatch(pattern, value):
            raise UserError(f"{key} is {value!r}, expected {expected}; set --vars.{key}.")
    return Path("packages") / f"{lang}_{name}-{version}"


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there; of a link, the link only."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def main(
    lang: Annotated[str, typer.Option(help="First part of the package's name")],
    name: Annotated[str, typer.Option(help="Second part of the package's name")],
    version: Annotated[str, typer.Option(help="The package's version")],
) -> None:
    """Remove everything that the project's commands have made, downloads included."""
    with one_sentence():
        package = package_folder(lang, name, version)
        unfinished = package.with_name("unfinished")
        for path in [*map(Path, MADE), *(Path("corpus") / name for name in CORPUS), unfinished, package]:
            if path.exists() or path.is_symlink():
                remove(path)
                msg.good(f"{path}: removed")


if __name__ == "__main__":
    typer.run(main)
