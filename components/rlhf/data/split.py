"""Assigns every prompt to exactly one role, so that no text leaks from one role to another."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping

from components.rlhf.data.messages import parse_transcript
from components.rlhf.data.records import Conversation

HELD_OUT = "held_out"


def hash_to_unit_interval(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends only on the seed and the parts, on any machine."""
    digest = hashlib.sha256("\x1f".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_role(key: str, eligible: Mapping[str, float], *, held_out: float, seed: int) -> str:
    """The role of all records with this key: HELD_OUT with probability held_out, else one of the eligible roles by weight.

    eligible maps each role that can use the key to its weight. The result depends only on the key and the seed: the same
    prompt in two files gets the same role, and adding records does not move others.
    """
    if hash_to_unit_interval(seed, "held out", key) < held_out:
        return HELD_OUT
    roles = sorted(role for role in eligible if eligible[role] > 0)
    total = sum(eligible[role] for role in roles)
    point = hash_to_unit_interval(seed, "role", key) * total
    for role in roles:
        point -= eligible[role]
        if point < 0:
            return role
    return roles[-1] if roles else HELD_OUT


def split_key(text: str, conversation: Conversation | None) -> str:
    """The normalized first message of the user: all records with the same one must get the same role.

    Case, punctuation, whitespace, system messages and later turns do not matter. text is the prompt of a record without
    conversation, of which a transcript (`Human: ...`) is read as one.
    """
    messages = conversation.messages if conversation is not None else parse_transcript(text)
    first = next((m.content for m in messages if m.role == "user"), None)
    if first is None:
        first = messages[0].content if messages else text
    normalized = unicodedata.normalize("NFKC", first).casefold()
    return " ".join(re.findall(r"\w+", normalized)) or " ".join(normalized.split())


def opening_words(text: str, num_words: int) -> str:
    """The first words of a text, case-folded, as a key."""
    return " ".join(text.split()[:num_words]).casefold()
