"""Who may see which text: every prompt belongs to one role, so that nothing crosses from one role to another."""

import hashlib
from collections.abc import Mapping

HELD_OUT = "held_out"


def hash_to_unit_interval(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on the seed and the parts alone, not on order or machine."""
    digest = hashlib.sha256("\x1f".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_role(key: str, eligible: Mapping[str, float], *, held_out: float, seed: int) -> str:
    """The role of all records with this key: held out, or one of the eligible roles by weight.

    eligible maps each role that has a use for the key to its weight. Because the answer depends on the key alone, the same
    prompt in two files lands in the same role, and adding records moves no other.
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
