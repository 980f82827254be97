"""Removes what a training left that was stopped before its end, and says that the next one starts over."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from wasabi import msg

from scripts.common import one_sentence


def main(folder: Annotated[Path, typer.Argument(help="What `spacy train` writes into", show_default=False)]) -> None:
    """Say so if an earlier training was stopped before its end, and remove what it left."""
    with one_sentence():
        if folder.exists():
            shutil.rmtree(folder)
            msg.warn(
                "An earlier training was stopped before its end. Training starts over from the encoder: spaCy's "
                "training loop keeps no state that it could go on from."
            )


if __name__ == "__main__":
    typer.run(main)
