import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from components.rlhf.text.words import split_words

# fmt: off
EXPECTED = {
    "English": ("It's a GREAT film!", ["it", "'", "s", "a", "great", "film", "!"]),
    "one letter": ("A", ["a"]),
    "one letter with punctuation": ("(B).", ["(", "b", ")", "."]),
    "numbers": ("3.14 or 2nd", ["3", ".", "14", "or", "2nd"]),
    "accents": ("Très naïve", ["très", "naïve"]),
    "accents as combining marks": ("cafe\u0301 au lait", ["cafe\u0301", "au", "lait"]),
    "Cyrillic": ("Очень хорошо", ["очень", "хорошо"]),
    "Chinese": ("今天很好。", ["今", "天", "很", "好", "。"]),
    "Chinese and English": ("我用Python3写", ["我", "用", "python3", "写"]),
    "Japanese": ("猫がパンを食べた!", ["猫", "が", "パ", "ン", "を", "食", "べ", "た", "!"]),
    "Japanese, long vowel": ("カー", ["カ", "ー"]),
    "Japanese, voiced mark as a combining mark": ("か\u3099", ["か\u3099"]),
    "Thai": ("กินดี ที่นี่", ["กิ", "น", "ดี", "ที่", "นี่"]),
    "Korean": ("정말 좋아요.", ["정말", "좋아요", "."]),
    "Arabic": ("مرحبا بالعالم، نعم", ["مرحبا", "بالعالم", "،", "نعم"]),
    "Arabic with vowel marks": ("مَرْحَبًا", ["مَرْحَبًا"]),
    "Hebrew with vowel marks": ("שָׁלוֹם", ["שָׁלוֹם"]),
    "Hindi": ("नमस्ते हिन्दी दुनिया।", ["नमस्ते", "हिन्दी", "दुनिया", "।"]),
    "Burmese": ("ပြည်", ["ပြ", "ည်"]),
    "code": (
        "for i in f(x_1):\n\treturn a[0] += 1  # Ok",
        ["for", "i", "in", "f", "(", "x_1", ")", ":", "return", "a", "[", "0", "]", "+", "=", "1", "#", "ok"],
    ),
    "emoji": ("ok😀👍", ["ok", "😀", "👍"]),
    "emoji with skin tone": ("👍🏽👎🏿", ["👍🏽", "👎🏿"]),
    "emoji of several, joined": ("👨‍👩‍👧 👩🏽‍💻", ["👨‍👩‍👧", "👩🏽‍💻"]),
    "flags, hearts and keycaps": ("🇩🇪🇫🇷❤️1️⃣", ["🇩🇪", "🇫🇷", "❤️", "1️⃣"]),
    "empty": ("", []),
    "whitespace only": (" \t\r\n\u00a0\u3000\u2028", []),
}
# fmt: on


@pytest.mark.parametrize(("text", "words"), EXPECTED.values(), ids=EXPECTED.keys())
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", " \n "])
def test_every_space_separates_words(space: str) -> None:
    assert split_words(f"{space}good{space}film{space}") == ["good", "film"]


def test_words_are_the_same_in_upper_and_lower_case() -> None:
    assert split_words("GREAT ÉCOLE ПРИВЕТ ΑΒΓ") == split_words("great école привет αβγ")


def test_every_character_of_unicode_is_kept() -> None:
    """One character alone is one word, unless it is a space."""
    for code in range(0x110000):
        text = chr(code)
        assert split_words(text) == ([] if text.isspace() else [text.lower()]), hex(code)


ANY_TEXT = st.text(st.characters(exclude_categories=[])) | st.text(
    st.sampled_from("aB1_ \n'.今がカー\u3099กี่مَनि्한\u0301\u200d\ufe0f👍🏽👨👩❤🇩🇪\r\u0600\ud800")
)


@settings(max_examples=1000, deadline=None)
@given(text=ANY_TEXT)
@example("a \u0301b")
@example("a \u200db")
@example("\u0600 1")
def test_words_are_the_text_without_its_spaces(text: str) -> None:
    words = split_words(text)
    assert not any(word == "" or any(character.isspace() for character in word) for word in words)
    assert "".join(words) == "".join(text.lower().split())


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from("ab1今がกมनक한م,👍"), min_size=1), max_size=5))
def test_texts_with_a_space_between_them_have_the_words_of_each(texts: list[str]) -> None:
    assert split_words(" ".join(texts)) == [word for text in texts for word in split_words(text)]


@settings(max_examples=300, deadline=None)
@given(
    letter=st.characters(categories=["Ll", "Lo"]),
    marks=st.text(st.characters(min_codepoint=0x300, max_codepoint=0x36F, categories=["Mn"]), max_size=3),
)
@example(letter="\u0e01", marks="\u0e34\u0e48")  # Thai
@example(letter="\u0b95", marks="\u0bca")  # Tamil
@example(letter="\u0641", marks="\u064e\u0651")  # Arabic
def test_combining_marks_stay_with_their_letter(letter: str, marks: str) -> None:
    assert split_words(f"{letter}{marks}.") == [(letter + marks).lower(), "."]
