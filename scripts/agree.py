"""Label sentences where several pipelines agree, as further training sentences for one more pipeline.

Pipelines that were trained with other seeds make other errors, so that what they agree on is right more often than
what one of them says (Zhou and Li 2005). The sentences' own tags are not read.
"""

from pathlib import Path
from typing import Annotated

import typer
from spacy.tokens import Doc
from wasabi import msg

from scripts.common import UserError, one_sentence, replacing
from scripts.evaluate import iob2
from scripts.panx import Sentence, guess_spaces, read_tsv, split_path, subset, to_tsv
from scripts.pipeline import load_pipeline


@one_sentence()
def main(
    models: Annotated[list[str], typer.Argument(help="Pipelines trained with other seeds", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for train.tsv")],
    data: Annotated[Path, typer.Option(help="Folder with the training sentences as TSV")] = Path("assets/data"),
    lang: Annotated[str, typer.Option(help="Language in the name of the TSV file")] = "it",
    train_size: Annotated[int, typer.Option(help="Sentences that were trained on, 0 for all")] = 1680,
    size: Annotated[int, typer.Option(help="Sentences to label, 0 for all")] = 0,
    gpu_id: Annotated[int, typer.Option(help="Number of the GPU, -1 for the CPU")] = -1,
) -> None:
    """Label the training sentences that the pipelines were not trained on, where all pipelines agree."""
    if len(models) < 2:
        raise UserError(f"{len(models)} pipeline given, expected two or more; train others with another --vars.seed.")
    path = split_path(data, "train", lang)
    sentences = [sentence.words for sentence in read_tsv(path)]
    known = {*subset(sentences, train_size, str(path))}
    others = [words for words in sentences if words not in known and any(word.strip() for word in words)]
    if not others:
        raise UserError(f"{path}: the pipelines were trained on every sentence; set a smaller --train-size.")
    some = subset(others, size, f"{path}, without the card's sentences")
    found = []
    for model in models:
        nlp = load_pipeline(model, gpu_id)
        docs = nlp.pipe(Doc(nlp.vocab, words=words, spaces=guess_spaces(words)) for words in some)
        found.append([tuple(iob2(doc)) for doc in docs])
    agreed = [Sentence(words, tags[0]) for words, *tags in zip(some, *found, strict=True) if len({*tags}) == 1]
    if not agreed:
        raise UserError(f"{', '.join(models)}: they agree on no sentence; train them for longer.")
    with replacing(output / "train.tsv") as file:
        file.write_bytes(to_tsv(agreed))
    msg.good(f"{output / 'train.tsv'}: {len(agreed):,} of {len(some):,} sentences, on which all pipelines agree")


if __name__ == "__main__":
    typer.run(main)
