"""Prints the entities that an installed pipeline finds in three Italian sentences."""

import sys

import spacy

SENTENCES = (
    "Rita Levi-Montalcini nacque a Torino e lavorò a lungo negli Stati Uniti.",
    "Il consiglio di amministrazione della Ferrari si riunisce lunedì a Maranello.",
    "Nel 1926 Grazia Deledda, scrittrice di Nuoro, vinse il premio Nobel per la letteratura.",
)

if __name__ == "__main__":
    nlp = spacy.load(sys.argv[1])
    for doc in nlp.pipe(SENTENCES):
        print(doc.text)
        for ent in doc.ents:
            print(f"  {ent.label_}  {ent.text}")
