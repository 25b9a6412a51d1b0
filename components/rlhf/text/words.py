"""Words of texts in any script."""

import regex

# Scripts that are written without spaces between words: each character counts as a word.
UNSPACED = r"ー\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
JOINERS = r"\u200c\u200d"  # between letters of one word, as in Persian and Sinhala
WORD = regex.compile(
    rf"[{UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}_]--[{UNSPACED}]][[\p{{L}}\p{{M}}\p{{N}}_{JOINERS}]--[{UNSPACED}]]*|\X",
    regex.VERSION1,
)


def split_words(text: str) -> list[str]:
    """Words, and the characters of scripts without spaces, punctuation and symbols (emoji are whole), in lower case.

    Spaces separate words and are not in the list.
    """
    return [word for piece in text.lower().split() for word in WORD.findall(piece)]
