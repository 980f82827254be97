"""The tokenizer `panx_xlmr.Tokenizer.v2`, and the text that the encoder reads.

The tokenizer is spaCy's own for the language, with separators by Unicode category and in linear time.

A text is cut at white space, at every punctuation mark, symbol and invisible character (Unicode categories P, S and C)
except the ones that words have inside, and after an elision (`dell'` + `Italia`). A slash or plus between letters
separates, because it usually joins two names (`Trento/Bolzano`), and so does a punctuation mark without the space
after it (`via Roma,12`).
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from html.entities import name2codepoint

from spacy import registry
from spacy.lang.char_classes import ALPHA_UPPER
from spacy.language import Language
from spacy.tokenizer import Tokenizer
from spacy.tokens import Doc
from spacy.util import compile_infix_regex, compile_prefix_regex, compile_suffix_regex

# Chunks of text without white space up to this length go to spaCy's tokenizer as they are.
LONG = 100
# A longer chunk is cut after this many characters; URLs are shorter.
PIECE = 2000
# Characters at either end of a long chunk in which a prefix or suffix is looked for.
SIGHT = 40
LONG_CHUNK = re.compile(rf"(\S{{{LONG + 1},}})( ?)")
SURROGATE = re.compile("[\ud800-\udfff]")
# Inside words: hyphens, apostrophes, a.C., 3,5, 12:30, H&M, a user name, 10%, 20°, C++, Catalan l·l, 1/2, and invisible
# characters (the soft hyphen and the joiners).
INSIDE_WORDS = frozenset("-\u2010\u2011'’.,:&@#_%°+·/\u00ad\u200c\u200d")
# Parts of the encoder's text: sentences, words, and signs that can stand before a word. Hyphens, accents and joiners
# cannot. White space that the encoder's tokenizer would delete is a sign, too.
SENTENCE = re.compile(r".+?(?:[.!?…]\s+|$)", re.DOTALL)
WORD = re.compile(r"[^\W\d_]{2,}")
SIGN = re.compile(r"[^\w\s\u0300-\u036f\u00ad\u200c\u200d\u2010\u2011-]|[\x0b\x1c-\x1f\x85]")


def _separators() -> str:
    """Return a regular expression for one punctuation mark, symbol or invisible character that separates words."""
    # the planes between have none, the last two are for private use; lone surrogates are replaced
    planes = [*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0080)]
    points = [i for i in planes if unicodedata.category(chr(i))[0] in "PSC" and chr(i) not in INSIDE_WORDS]
    points = [i for i in points if not chr(i).isspace()]
    starts = [i for i, before in zip(points, [-2, *points], strict=False) if i != before + 1]
    ends = [i for i, after in zip(points, [*points[1:], -2], strict=True) if i != after - 1]
    ranges = (f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in zip(starts, ends, strict=True))
    return f"[{''.join(ranges)}\U000f0000-\U0010ffff]"


class LinearTokenizer(Tokenizer):
    """spaCy's tokenizer for any Python string.

    - spaCy's own searches the whole rest of a chunk for each prefix: 100,000 brackets take a quarter of an hour. This
      one searches chunks above LONG characters in parts.
    - spaCy's own raises UnicodeEncodeError for a lone surrogate. Here U+FFFD replaces it, and offsets stay valid.
    """

    def __call__(self, string: str) -> Doc:
        """Tokenize a string. Raises ValueError for one of 2^30 characters or more."""
        string = SURROGATE.sub("\ufffd", string)
        if not LONG_CHUNK.search(string):
            return super().__call__(string)
        texts, start = [], 0
        for chunk in LONG_CHUNK.finditer(string):
            texts += [string[start : chunk.start()], *self._parts(chunk[1])]
            texts[-1] += chunk[2]  # spaCy stores one space with the token before it
            start = chunk.end()
        tokens = [
            (token.text, bool(token.whitespace_), token.norm_)
            for text in (*texts, string[start:])
            for token in Tokenizer.__call__(self, text)
        ]
        words, spaces, norms = zip(*tokens, strict=True)
        doc = Doc(self.vocab, words=words, spaces=spaces)
        for token, norm in zip(doc, norms, strict=True):
            if token.norm_ != norm:  # set by one of the language's exceptions
                token.norm_ = norm
        return doc

    def _parts(self, chunk: str) -> Iterator[str]:
        """Yield the prefixes, the rest and the suffixes of a chunk without white space."""
        for place in range(0, len(chunk), PIECE):
            piece = chunk[place : place + PIECE]
            start, end = 0, len(piece)
            while end - start > LONG and (size := self.find_prefix(piece[start : start + SIGHT])):
                yield piece[start : start + size]
                start += size
            suffixes = []
            while end - start > LONG and (size := self.find_suffix(piece[end - SIGHT : end])):
                suffixes.append(piece[end - size : end])
                end -= size
            yield piece[start:end]
            yield from reversed(suffixes)


@registry.tokenizers("panx_xlmr.Tokenizer.v2")
def linear_tokenizer() -> Callable[[Language], Tokenizer]:
    """Return a function that makes the tokenizer from a language's own rules."""

    def create(nlp: Language) -> Tokenizer:
        stock, sign = nlp.Defaults, _separators()
        # an emoji with the selector of its variant, `&nbsp;` (not `H&M;`)
        wholes = ["[^\\w\\s][\ufe00-\ufe0f]+", f"&(?:#\\w+|apos|{'|'.join(name2codepoint)});"]
        # not inside a word at its beginning or end
        joint = "[-\u2010\u2011/]+"
        # a period after a missing space (`casa .Bari`) goes, but not that of `.it`
        prefixes = [*wholes, *stock.prefixes, sign, f"{joint}(?=[^\\W\\d])", f"\\.(?=[{ALPHA_UPPER}])"]
        # the period of a letter (`Serie B.`), of a word (`SpaceX.`), after a combining accent (`Cefalu\u0300.`) or sign
        period = f"(?:(?<=^\\w)|(?<=\\w\\w)|(?<=[\u0300-\u036f])|(?<={sign}))\\."
        letter, quotes = "[^\\W\\d_]", "['’]+"
        footnote = f"(?<={letter}{letter})[\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+"  # `Deledda¹`, not `m²`
        suffixes = [*stock.suffixes, *wholes, sign, f"(?<=\\w){joint}", period, footnote]
        # `via Roma,12`, `Bari,'Roma'`, `1.Bari`
        missing_spaces = [
            f"(?<={letter})[,:](?=\\d|{quotes})",
            f"(?<={letter}[,:]){quotes}",
            f"(?<=\\d)([,:](?={letter})|\\.(?=[{ALPHA_UPPER}]))",
        ]
        signs = ["(?<!:)[-\u2010\u2011/]{2,}", "(?<=['’])[_#@&]+", r"(?<=\w)\+(?=[^\W\d])", sign]
        infixes = [*wholes, "'{2,}", *stock.infixes, *missing_spaces, *signs]
        return LinearTokenizer(
            nlp.vocab,
            rules={text: rule for text, rule in stock.tokenizer_exceptions.items() if not re.fullmatch(r"\w\.", text)},
            prefix_search=compile_prefix_regex(prefixes).search,
            suffix_search=compile_suffix_regex(suffixes).search,
            infix_finditer=compile_infix_regex(infixes).finditer,
            token_match=stock.token_match or re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]\.?$").match,  # S.p.A.
            url_match=stock.url_match,
        )

    return create


@registry.misc("panx_xlmr.EncoderText.v1")
def encoder_text(doc: Doc) -> tuple[str, list[int]]:
    """Return the text that the encoder reads, and the places of the spaces that it has in addition.

    Lines and sentences in capitals are in lower case. A space parts a sign and the word after it (`dell' Italia`),
    since most words have wordpieces of their own only after a space.
    """
    text = without_capitals(doc.text)
    starts = [token.idx for token in doc if token.i and token.text[0].isalpha() and SIGN.match(text, token.idx - 1)]
    parts = [text[start:end] for start, end in zip([0, *starts], [*starts, None], strict=True)]
    return " ".join(parts), [start + i for i, start in enumerate(starts)]


def without_capitals(text: str) -> str:
    """Return the text with lines and sentences in capitals in lower case; no character moves.

    A line or sentence with fewer than three words of two letters stays: it may be an acronym or a surname.
    """
    lines = text.splitlines(keepends=True)
    parts = [part for line in lines for part in ([line] if _is_in_capitals(line) else SENTENCE.findall(line))]
    # all but "İ", which has two characters in lower case
    return "".join(re.sub("[^İ]+", lambda m: m[0].lower(), part) if _is_in_capitals(part) else part for part in parts)


def _is_in_capitals(text: str) -> bool:
    return text.isupper() and len(WORD.findall(text)) >= 3
