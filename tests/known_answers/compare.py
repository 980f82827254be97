"""Compare the entities that the demo's package finds in 200 fixed sentences with the accepted ones.

Run `make known-answers` after `make demo`; `make known-answers ACCEPT=1` accepts what the package finds now. To add a
sentence, add a line `{"text": "…", "ents": []}` to answers.jsonl and accept.
"""

from pathlib import Path
from typing import Annotated, Any

import spacy
import srsly
import typer
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing

ANSWERS = Path(__file__).with_name("answers.jsonl")
ACCEPT = "`make known-answers ACCEPT=1`"


def find(pipeline: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return the entities of each text as (first character, character after the last, label)."""
    return [
        {"text": doc.text, "ents": [[ent.start_char, ent.end_char, ent.label_] for ent in doc.ents]}
        for doc in spacy.load(pipeline).pipe(texts)
    ]


def differences(accepted: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Describe each sentence with other entities: - before an entity that is gone, + before a new one."""
    blocks = []
    for number, rows in enumerate(zip(accepted, found, strict=True), start=1):
        text, (before, now) = rows[0]["text"], ({tuple(ent) for ent in row["ents"]} for row in rows)
        lines = [
            f"  {'-' if ent in before else '+'} {ent[2]} {text[ent[0] : ent[1]]!r} ({ent[0]}-{ent[1]})"
            for ent in sorted(before ^ now)
        ]
        if lines:
            blocks.append("\n".join([f"sentence {number}: {text}", *lines]))
    return blocks


def main(
    pipeline: Annotated[str, typer.Argument(help="Installed package or folder", show_default=False)],
    accept: Annotated[bool, typer.Option("--accept", help="Store what it finds as accepted")] = False,
    answers: Annotated[Path, typer.Option(help="JSON lines with the accepted entities")] = ANSWERS,
) -> None:
    """Compare a pipeline's entities in fixed sentences with those that were accepted."""
    with one_sentence():
        try:
            accepted = list(srsly.read_jsonl(answers))
            found = find(pipeline, [row["text"] for row in accepted])
            different = differences(accepted, found)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{answers}: not what {ACCEPT} writes ({error!r}); restore the file from git.") from None
        if accept:
            with replacing(answers) as path:
                srsly.write_jsonl(path, found)
            msg.good(f"{answers}: {sum(len(row['ents']) for row in found)} entities in {len(found)} sentences accepted")
        elif different:
            print("\n".join(different))
            raise UserError(
                f"{len(different)} of {len(found)} sentences have other entities than accepted; if that is right, "
                f"run {ACCEPT} and commit {answers.name}."
            )
        else:
            msg.good(f"{len(found)} sentences have exactly the accepted entities")


if __name__ == "__main__":
    typer.run(main)
