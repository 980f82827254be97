import pytest

from conftest import invoke
from lookup_ner import ruler
from scripts import agree
from scripts.panx import Sentence, read_tsv, subset, to_tsv

SENTENCES = [("Rita", "vive", "a", "Bari"), ("Bari", "(", "Bari", ")"), ("il", "mare"), (" ",), ("Bari",), ("Sì",)]


@pytest.fixture
def pipelines(tmp_path):
    """Two pipelines of rules: both know Bari, and each calls Rita something else."""
    for label in ("PER", "ORG"):
        ruler({"Bari": "LOC", "Rita": label}).to_disk(tmp_path / label)
    return [tmp_path / "PER", tmp_path / "ORG"]


@pytest.fixture
def options(tmp_path):
    data = [Sentence(words, ("O",) * len(words)) for words in SENTENCES]
    (tmp_path / "train-it.tsv").write_bytes(to_tsv(data))
    return ["--data", tmp_path, "--output", tmp_path / "agreed"]


@pytest.mark.parametrize("trained_on", [1, 2, 3])
def test_it_labels_the_other_sentences_where_all_pipelines_agree(pipelines, options, tmp_path, trained_on):
    assert invoke(agree.main, *pipelines, *options, "--train-size", trained_on).exit_code == 0
    tags = {
        SENTENCES[1]: ("B-LOC", "O", "B-LOC", "O"),
        SENTENCES[2]: ("O", "O"),
        ("Bari",): ("B-LOC",),
        ("Sì",): ("O",),
    }
    expected = {Sentence(*item) for item in tags.items() if item[0] not in subset(SENTENCES, trained_on, "train")}
    assert {*read_tsv(tmp_path / "agreed" / "train.tsv")} == expected


def test_what_cannot_be_labelled_is_refused_and_nothing_is_written(pipelines, options, tmp_path, refused):
    assert "expected two or more" in refused(agree, pipelines[0], *options, "--train-size", 1)
    assert "trained on every sentence" in refused(agree, *pipelines, *options, "--train-size", 0)
    assert "9 asked for" in refused(agree, *pipelines, *options, "--train-size", 1, "--size", 9)
    (tmp_path / "train-it.tsv").write_text("Rita\tO\n\nRita\tO\nRita\tO\n")
    assert "agree on no sentence" in refused(agree, *pipelines, *options, "--train-size", 1)
    assert not (tmp_path / "agreed").exists()
