"""Compare the entities that the demo's package finds in 200 fixed sentences with the accepted ones.

Run `make known-answers` after `make demo`; `make known-answers ACCEPT=1` accepts what the package finds now.
"""

from pathlib import Path
from typing import Annotated, Any

import spacy
import srsly
import typer
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing

FOLDER = Path(__file__).resolve().parent
ACCEPT = "`make known-answers ACCEPT=1`"


def find(pipeline: str, sentences: Path) -> list[dict[str, Any]]:
    """Return the entities of each line as (first character, character after the last, label)."""
    texts = sentences.read_text(encoding="utf8").splitlines()
    return [
        {"text": doc.text, "ents": [[ent.start_char, ent.end_char, ent.label_] for ent in doc.ents]}
        for doc in spacy.load(pipeline).pipe(texts)
    ]


def differences(accepted: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """Describe each sentence with other entities: - before an entity that is gone, + before a new one."""
    known = {row["text"]: {tuple(ent) for ent in row["ents"]} for row in accepted}
    blocks = []
    for number, row in enumerate(found, start=1):
        text, now = row["text"], {tuple(ent) for ent in row["ents"]}
        before = known.get(text)
        if before is None:
            blocks.append(f"sentence {number}: {text}\n  is not among the accepted sentences")
        elif before != now:
            lines = [
                f"  {'-' if ent in before else '+'} {ent[2]} {text[ent[0] : ent[1]]!r} ({ent[0]}-{ent[1]})"
                for ent in sorted(before ^ now)
            ]
            blocks.append("\n".join([f"sentence {number}: {text}", *lines]))
    gone = known.keys() - {row["text"] for row in found}
    return blocks + [f"accepted sentence that is gone: {text}" for text in sorted(gone)]


def main(
    pipeline: Annotated[str, typer.Argument(help="Installed package or folder", show_default=False)],
    accept: Annotated[bool, typer.Option("--accept", help="Store what it finds as accepted")] = False,
    sentences: Annotated[Path, typer.Option(help="Text file, one sentence per line")] = FOLDER / "sentences.txt",
    answers: Annotated[Path, typer.Option(help="JSON lines with the accepted entities")] = FOLDER / "answers.jsonl",
) -> None:
    """Compare a pipeline's entities in fixed sentences with those that were accepted."""
    with one_sentence():
        if not accept and not answers.is_file():
            raise UserError(f"{answers}: no answers accepted yet; check the demo's output and run {ACCEPT}.")
        found = find(pipeline, sentences)
        if accept:
            with replacing(answers) as path:
                srsly.write_jsonl(path, found)
            msg.good(f"{answers}: {sum(len(row['ents']) for row in found)} entities in {len(found)} sentences accepted")
            return
        try:
            different = differences(list(srsly.read_jsonl(answers)), found)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{answers}: not what {ACCEPT} writes ({error!r}); restore the file from git.") from None
        if different:
            print("\n".join(different))
            raise UserError(
                f"{len(different)} of {len(found)} sentences have other entities than accepted; if that is right, "
                f"run {ACCEPT} and commit {answers.name}."
            )
        msg.good(f"{len(found)} sentences have exactly the accepted entities")


if __name__ == "__main__":
    typer.run(main)
