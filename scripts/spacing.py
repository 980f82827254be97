"""Which of PAN-X's tokens a person would write with a space after them."""

from collections.abc import Sequence

CLOSING = frozenset(")]},;:.!?%…»”") | {"...", "]]"}
OPENING = frozenset("([{«“¿¡") | {"[[", "``"}
CLITICS = frozenset({"n't", "'s", "'re", "'m", "'ll", "'ve", "'d"})
QUOTES = ('"', "'", "''", "'''")


def guess_spaces(words: Sequence[str]) -> list[bool]:
    """For each token, whether a space follows it, so that the text reads `(1984)`, `Milano, Roma` or `''città''`.

    Quotes are paired in order: the first of a pair joins the token after it, the second the token before it. Quotes
    that PAN-X has glued to a word (`''città`) take part. One without a partner opens at the start and closes elsewhere.
    """
    joins_next = [word in OPENING for word in words]
    joins_previous = [word in CLOSING or word in CLITICS for word in words]
    for quote in QUOTES:
        is_open = False
        for i, word in enumerate(words):
            if word == "``" and quote == "''":  # what the Penn Treebank opens with `` it closes with ''
                is_open = True
            elif word == quote:
                partner_follows = any(later == quote for later in words[i + 1 :])
                is_open = not is_open and (partner_follows or i == 0)
                joins_next[i], joins_previous[i] = is_open, not is_open
            elif word.startswith(quote) and word.strip("'\""):
                # 'Bryan' opens, but the ' of '6-4 closes what stands open and leaves the score apart
                joins_previous[i] = joins_previous[i] or (is_open and quote == "'" and word[1].isdigit())
                is_open = not is_open and not word.endswith(quote)
    spaces = [not (joins_next[i] or joins_previous[i + 1]) for i in range(len(words) - 1)]
    return [*spaces, False]
