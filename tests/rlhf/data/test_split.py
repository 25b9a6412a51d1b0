from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rlhf.data.records import Conversation, Message
from components.rlhf.data.split import HELD_OUT, assign_role, hash_to_unit_interval, opening_words, split_key

KEYS = [f"prompt number {number}" for number in range(4000)]
WEIGHTS = {"sft": 0.2, "reward_model": 0.5, "judge": 0.3}


def roles(
    keys: list[str], *, eligible: dict[str, float] = WEIGHTS, held_out: float = 0.1, seed: int = 0
) -> dict[str, str]:
    return {key: assign_role(key, eligible, held_out=held_out, seed=seed) for key in keys}


def test_shares_are_proportional_to_weights() -> None:
    """With 4000 draws, three standard deviations of a share are at most 0.024."""
    shares = {role: count / len(KEYS) for role, count in Counter(roles(KEYS).values()).items()}
    expected = {HELD_OUT: 0.1, "sft": 0.18, "reward_model": 0.45, "judge": 0.27}  # 0.9 times each weight
    assert shares == pytest.approx(expected, abs=0.024)


def test_weights_are_relative() -> None:
    tenfold = {role: 10 * weight for role, weight in WEIGHTS.items()}
    assert roles(KEYS[:500]) == roles(KEYS[:500], eligible=tenfold)


def test_role_depends_only_on_key_and_seed() -> None:
    assert roles(KEYS) == roles(KEYS[::-1])
    assert roles(KEYS[:10]).items() <= roles(KEYS).items()  # more records do not change roles
    assert roles(KEYS, eligible=dict(reversed(WEIGHTS.items()))) == roles(KEYS)
    assert roles(KEYS, seed=1) != roles(KEYS)


def test_held_out_does_not_depend_on_eligible_roles() -> None:
    """The number of files that contain a prompt does not matter."""
    one = {key for key, role in roles(KEYS, eligible={"sft": 1.0}).items() if role == HELD_OUT}
    other = {key for key, role in roles(KEYS).items() if role == HELD_OUT}
    assert one == other


def test_held_out_and_role_are_independent_draws() -> None:
    """With a single draw, the first role would get no keys that are not held out."""
    assert Counter(roles(KEYS, held_out=0.5).values())["judge"] == pytest.approx(0.15 * len(KEYS), rel=0.15)


@pytest.mark.parametrize(("held_out", "expected"), [(0.0, "sft"), (1.0, HELD_OUT)])
def test_held_out_of_0_and_1(held_out: float, expected: str) -> None:
    assert set(roles(KEYS[:100], eligible={"sft": 1.0}, held_out=held_out).values()) == {expected}


def test_role_without_weight_gets_nothing() -> None:
    assert set(roles(KEYS[:200], eligible={"sft": 0.0, "judge": 1.0}, held_out=0).values()) == {"judge"}
    assert set(roles(KEYS[:200], eligible={"sft": 0.0}, held_out=0).values()) == {HELD_OUT}  # no role can use it


@settings(max_examples=50, deadline=None)
@given(key=st.text(), seed=st.integers(0, 2**31 - 1), held_out=st.floats(0, 1))
def test_every_key_has_a_valid_role(key: str, seed: int, held_out: float) -> None:
    assert assign_role(key, WEIGHTS, held_out=held_out, seed=seed) in {HELD_OUT, *WEIGHTS}


def test_hash_separates_parts() -> None:
    assert hash_to_unit_interval(0, "a", "b") != hash_to_unit_interval(0, "ab")
    assert hash_to_unit_interval(1, "1") != hash_to_unit_interval(11, "")


# --- keys ---


def chat(*texts: str, system: str = "") -> Conversation:
    """A conversation of user and assistant in turn."""
    messages = [Message(role="system", content=system)] if system else []
    messages += [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]
    return Conversation(messages=tuple(messages))


@pytest.mark.parametrize(
    ("text", "conversation"),
    [
        ("What is 2 plus 2?", None),
        ("  what IS\n2 plus 2 ", None),
        ("\uff37hat is \uff12 plus 2", None),  # full-width letters
        ("\n\nHuman: What is 2 plus 2?\n\nAssistant:", None),
        ("\n\nHuman: What is 2 plus 2?\n\nAssistant: 4\n\nHuman: Sure?\n\nAssistant:", None),
        ("rendered", chat("What is 2 plus 2?")),
        ("rendered", chat("What is 2 plus 2?", system="Be brief.")),
        ("rendered", chat("What is 2 plus 2?", "4", "Are you sure?")),
    ],
)
def test_same_first_question_has_the_same_key(text: str, conversation: Conversation | None) -> None:
    assert split_key(text, conversation) == "what is 2 plus 2"


def test_key_of_other_scripts_and_of_symbols() -> None:
    assert split_key("\u4f60\u597d\uff1f", None) == "\u4f60\u597d"
    assert split_key(" ?! ", None) == "?!"
    assert split_key("x", Conversation(messages=(Message(role="system", content="Go."),))) == "go"


def test_opening_words_ignore_case_and_whitespace() -> None:
    assert opening_words("The  Film\tis good", 2) == "the film" == opening_words("THE FILM", 2)
    assert opening_words("The", 2) == "the"
