"""Compare the entities that the demo's package finds in 200 fixed sentences with the accepted ones.

Run `make known-answers` after `make demo`; `make known-answers ACCEPT=1` accepts what the package finds now. To add a
sentence, add a line `{"text": "…", "ents": []}` to known_answers.jsonl and accept.
"""

import sys
from pathlib import Path

import spacy
import srsly

ANSWERS = Path(__file__).with_suffix(".jsonl")


def main(pipeline: str, accept: bool) -> None:
    """Print each sentence with other entities than accepted, or store them; exit with 1 if there are any."""
    accepted = list(srsly.read_jsonl(ANSWERS))
    docs = list(spacy.load(pipeline).pipe(row["text"] for row in accepted))
    found = [{"text": doc.text, "ents": [[e.start_char, e.end_char, e.label_] for e in doc.ents]} for doc in docs]
    if accept:
        srsly.write_jsonl(ANSWERS, found)
    different = [rows for rows in zip(accepted, found, strict=True) if rows[0] != rows[1]]
    for before, now in different:
        print(before["text"])
        for sign, row, other in (("-", before, now), ("+", now, before)):
            for start, end, label in [ent for ent in row["ents"] if ent not in other["ents"]]:
                print(f"  {sign} {label} {row['text'][start:end]!r} ({start}-{end})")
    print(f"{len(different)} of {len(found)} sentences have other entities than accepted")
    if different and not accept:
        sys.exit(f"If they are right, run `make known-answers ACCEPT=1` and commit {ANSWERS.name}.")


if __name__ == "__main__":
    main(sys.argv[1], "--accept" in sys.argv)
