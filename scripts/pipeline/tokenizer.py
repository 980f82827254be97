"""The tokenizer `panx_xlmr.Tokenizer.v1`: spaCy's own of the language, in linear time, for any Python string.

The installable package carries this file, as it carries the pipes'.
"""

import re
from collections.abc import Callable, Iterator

from spacy import registry
from spacy.language import Language, create_tokenizer
from spacy.tokenizer import Tokenizer
from spacy.tokens import Doc

# Characters without white space between them that spaCy's tokenizer still gets at a time.
LONG = 100
# A longer chunk is cut after so many characters; addresses and the like are shorter.
PIECE = 2000
# Characters at either end of a long chunk in which a prefix or suffix is looked for.
SIGHT = 40
LONG_CHUNK = re.compile(rf"\S{{{LONG + 1},}}")
SURROGATE = re.compile("[\ud800-\udfff]")


class LinearTokenizer(Tokenizer):
    """spaCy's tokenizer, without two things that a text from outside can do to it.

    - It takes one sign after the other off a chunk of text without white space and looks at the whole rest each time:
      100,000 brackets in a row would take a quarter of an hour. Here chunks above LONG characters are seen in parts.
    - It raises UnicodeEncodeError for a lone surrogate, which JSON and file names can bring into a string. Here U+FFFD
      takes its place in the Doc, so that all offsets are those of the text that was given.
    """

    def __call__(self, string: str) -> Doc:
        """Tokenizes a string. Raises ValueError, as spaCy does, for one of 2^30 characters or more."""
        string = SURROGATE.sub("\ufffd", string)
        if not LONG_CHUNK.search(string):
            return super().__call__(string)
        words: list[str] = []
        spaces: list[bool] = []
        norms: list[str] = []

        def add(text: str) -> None:
            for token in Tokenizer.__call__(self, text):
                words.append(token.text)
                spaces.append(bool(token.whitespace_))
                norms.append(token.norm_)

        start = 0
        for chunk in LONG_CHUNK.finditer(string):
            add(string[start : chunk.start()])
            for part in self._parts(chunk.group()):
                add(part)
            start = chunk.end()
            if string[start : start + 1] == " ":  # as everywhere in spaCy, it belongs to the token before it
                spaces[-1] = True
                start += 1
        add(string[start:])
        doc = Doc(self.vocab, words=words, spaces=spaces)
        for token, norm in zip(doc, norms, strict=True):
            if token.norm_ != norm:  # that of an exception of the language
                token.norm_ = norm
        return doc

    def _parts(self, chunk: str) -> Iterator[str]:
        """What a chunk without white space is tokenized as: each prefix, the rest, each suffix."""
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


@registry.tokenizers("panx_xlmr.Tokenizer.v1")
def linear_tokenizer() -> Callable[[Language], Tokenizer]:
    """Gives the language's tokenizer, with the language's own rules."""

    def create(nlp: Language) -> Tokenizer:
        spacys = create_tokenizer()(nlp)
        return LinearTokenizer(
            nlp.vocab,
            rules=spacys.rules,
            prefix_search=spacys.prefix_search,
            suffix_search=spacys.suffix_search,
            infix_finditer=spacys.infix_finditer,
            token_match=spacys.token_match,
            url_match=spacys.url_match,
        )

    return create
