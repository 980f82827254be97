import pickle

import pytest
import spacy
from spacy.tokenizer import Tokenizer

from scripts.pipeline import blank_pipeline
from scripts.pipeline.tokenizer import LONG, LinearTokenizer

ADDRESS = "http://example.org/" + "sezione/" * 30 + "?nome=Grazia"


@pytest.fixture(scope="module")
def tokenizer():
    return blank_pipeline("it").tokenizer


@pytest.fixture(scope="module")
def spacys(tokenizer):
    """spaCy's own class with the same rules."""
    names = ("rules", "prefix_search", "suffix_search", "infix_finditer", "token_match", "url_match")
    return Tokenizer(tokenizer.vocab, **{name: getattr(tokenizer, name) for name in names})


def tokens(doc):
    return [(token.text, token.whitespace_, token.norm_) for token in doc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("**Grazia Deledda**, _Nuoro_", "* * Grazia Deledda * * , _ Nuoro _"),
        ("Nuoro<br/>e Nuoro–e Bari—Po", "Nuoro < br/ > e Nuoro – e Bari — Po"),
        ("Trento/Bolzano (o Bari|Po)", "Trento / Bolzano ( o Bari | Po )"),
        ("l'«Eni» e dell’“Ansa”", "l' « Eni » e dell’ “ Ansa ”"),
        ("Roma…e Milano(MI) e Roma😀", "Roma … e Milano ( MI ) e Roma 😀"),
        ("dell'Italia, L'Aquila, D'Annunzio", "dell' Italia , L' Aquila , D' Annunzio"),
        ("Serie B. SpaceX. Cefalu\u0300. Poi", "Serie B . SpaceX . Cefalu\u0300 . Poi"),
        ("\ufeffBari\u200b e\U000f0031Bari", "\ufeff Bari \u200b e \U000f0031 Bari"),
        ("3.500,20 alle 12:30, H&M; C++", "3.500,20 alle 12:30 , H&M ; C++"),
        ("•Bari |Roma| /Po/ \\Eni \uf0b7Rai \x01Ansa", "• Bari | Roma | / Po / \\ Eni \uf0b7 Rai \x01 Ansa"),
        ("-Bari, Roma-- e Po--Eni, anglo- e", "- Bari , Roma -- e Po -- Eni , anglo - e"),
        ("Roma❤\ufe0fe \U0001f3f4\U000e0067\U000e007fPo", "Roma ❤\ufe0f e \U0001f3f4 \U000e0067 \U000e007f Po"),
        ("Nuoro&nbsp;e &laquo;Bari&raquo;, l'_Eni_", "Nuoro &nbsp; e &laquo; Bari &raquo; , l' _ Eni _"),
        ("la Fiat S.p.A. (S.r.l.), Bari+Po e C++ .Eni", "la Fiat S.p.A. ( S.r.l. ) , Bari + Po e C++ . Eni"),
        ("via Po,12 1.Bari 12,Po Bari,'Eni' 1.000", "via Po , 12 1 . Bari 12 , Po Bari , ' Eni ' 1.000"),
        ("@Bari a_b Mario_Rossi a+b@c.it .it", "@Bari a_b Mario_Rossi a+b@c.it .it"),
        ("Deledda¹, Nuoro²³ e 3 m²", "Deledda ¹ , Nuoro ²³ e 3 m²"),
        ("Levi-Montalcini ha un'e-mail: a.b@c.it", "Levi-Montalcini ha un' e-mail : a.b@c.it"),
    ],
)
def test_signs_part_words_by_their_unicode_category(tokenizer, text, words):
    assert [token.text for token in tokenizer(text)] == words.split(" ")


@pytest.mark.parametrize(
    "text",
    [
        ADDRESS,
        f"Vedi «{ADDRESS}», disse (a.C.).",
        f"  {ADDRESS}  \n {ADDRESS} ",
        "(" * 300 + "Bari" + ")" * 300,
        "Bari" * 100,
        "dell'" * 100 + "Italia",
        "€" * 300 + " po' " + "=" * 300,
        "“" * LONG + "Bari" + "”" * LONG + "\u2028e",
    ],
)
def test_long_chunks_are_tokenized_as_spacy_does(tokenizer, spacys, text):
    assert len(text) > LONG
    assert tokens(tokenizer(text)) == tokens(spacys(text))


@pytest.mark.parametrize("sign", ["'", "(", "€", "'s", "1°", "http://a:b@"])
def test_twice_the_signs_are_twice_the_work(tokenizer, sign):
    looked_at = []

    def counting(search):
        return lambda text: looked_at.append(len(text)) or search(text)

    searches = ("prefix_search", "suffix_search", "infix_finditer", "url_match")
    counted = LinearTokenizer(tokenizer.vocab, **{name: counting(getattr(tokenizer, name)) for name in searches})
    work = []
    for size in (4000, 8000):
        looked_at.clear()
        counted(sign * (size // len(sign)))
        work.append(sum(looked_at))
    assert work[1] < 2.2 * work[0]


def test_it_goes_to_disk_and_through_pickle(tmp_path):
    nlp = blank_pipeline("it")
    nlp.to_disk(tmp_path)
    for copy in (spacy.load(tmp_path), pickle.loads(pickle.dumps(nlp))):
        assert type(copy.tokenizer) is LinearTokenizer
        assert tokens(copy.tokenizer("dell'art. 3")) == tokens(nlp.tokenizer("dell'art. 3"))


def test_it_has_the_languages_own_rules():
    english = blank_pipeline("en")
    assert [t.text for t in english("don't")] == [t.text for t in spacy.blank("en")("don't")] == ["do", "n't"]
