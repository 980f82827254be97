import datasets
import pytest

from scripts.common import UserError
from scripts.panx import Sentence, guess_spaces, read_tsv, subset


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf8"))
    return path


def test_windows_line_ends_and_byte_order_mark_change_nothing(tmp_path):
    path = write(tmp_path / "a.tsv", "\ufeffRoma\tB-LOC\r\n\r\nEni\tB-ORG\r\n")
    assert read_tsv(path) == [Sentence(("Roma",), ("B-LOC",)), Sentence(("Eni",), ("B-ORG",))]


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("Roma\tB-LOC\nRoma\tB-GPE\n", "line 2", "unknown tag 'B-GPE'"),
        ("Roma\tB-LOC\n\nRoma B-LOC\n", "line 3", "0 tabs"),
        ("Roma\t\tB-LOC\n", "line 1", "2 tabs"),
        ("Roma\tB-LOC\n\t\nEni\tB-ORG\n", "line 2", "unknown tag ''"),
        (b"\xef\xbb\xbfRoma\tB-LOC\n\xe0\tO\n", "line 2", "not UTF-8 (byte 0xe0)"),
        ("\n\n", "", "no sentence"),
    ],
)
def test_refuses_bad_input_with_file_and_line(tmp_path, text, line, expected):
    path = write(tmp_path / "bad.tsv", text)
    with pytest.raises(UserError) as error:
        read_tsv(path)
    assert str(error.value).startswith(f"{path}, {line}" if line else str(path))
    assert expected in str(error.value)


@pytest.mark.parametrize("size", [1, 100, 683])
def test_subset_is_what_datasets_shuffle_and_select_pick(sample, size):
    rows = datasets.Dataset.from_dict({"words": [list(s.words) for s in sample["train"]]})
    picked = rows.shuffle(seed=0).select(range(size))["words"]
    assert [list(s.words) for s in subset(sample["train"], size, "train")] == list(picked)


def joined(words):
    return "".join(word + " " * space for word, space in zip(words, guess_spaces(words), strict=True))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("Milano , Roma .", "Milano, Roma."),
        ("Torneo di Bari ( BA ) : finale", "Torneo di Bari (BA): finale"),
        ("la '' città '' eterna", "la ''città'' eterna"),
        ("' '' Scuderia Ferrari '' '", "'''Scuderia Ferrari'''"),
        ('il " sì " vinse', 'il "sì" vinse'),
        ("`` Amarcord '' e `` Roma ''", "``Amarcord'' e ``Roma''"),
        ("in Norvegia ( ''Bris '' )", "in Norvegia (''Bris'')"),
        ("Anna Rossi '' ( finale )", "Anna Rossi'' (finale)"),
        ("Do n't Look Back", "Don't Look Back"),
        ("al 12,5 % dei voti", "al 12,5% dei voti"),
        ("Rossi - Bianchi / Verdi", "Rossi - Bianchi / Verdi"),
        ("[ 12-10 ]", "[12-10]"),
    ],
)
def test_reads_as_a_person_would_write_it(tokens, expected):
    assert joined(tokens.split()) == expected
