import srsly

from known_answers import compare
from scripts.panx import read_tsv


def test_no_sentence_of_the_sample_and_of_the_known_answers_is_copied_from_panx(sample, panx_dir):
    panx = {" ".join(s.words).replace(" ", "") for split in sample for s in read_tsv(panx_dir / f"{split}-it.tsv")}
    ours = [" ".join(s.words) for sentences in sample.values() for s in sentences]
    ours += [row["text"] for row in srsly.read_jsonl(compare.ANSWERS)]
    assert [text for text in ours if text.replace(" ", "") in panx] == []
