import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.panx import guess_spaces


def text(words):
    return "".join(word + " " * space for word, space in zip(words, guess_spaces(words), strict=True))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("( 1984 )", "(1984)"),
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
        ("dell'Italia", "dell'Italia"),
    ],
)
def test_reads_as_a_person_would_write_it(tokens, expected):
    assert text(tokens.split()) == expected


@given(st.lists(st.sampled_from(["a", "'", "''", '"', "``", "(", ")", ",", "''b", "c''", "'6-4", "n't"]), min_size=1))
def test_every_token_gets_one_answer_and_the_last_no_space(words):
    spaces = guess_spaces(words)
    assert len(spaces) == len(words)
    assert spaces[-1] is False
