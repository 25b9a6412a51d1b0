"""Which of two policies goes to the gate."""

import itertools

import pytest

from components.evaluation.better import Outcome, choose_better, explain
from components.rlhf.config.policy import Method

Row = tuple[str, float | None, float]  # decision, win rate, KL
PROMOTED, REJECTED = "promote", "reject"
# By hand: the rows of PPO and DPO, which one goes to the gate, and a part of the reason.
TABLE: list[tuple[Row, Row, str, str]] = [
    ((PROMOTED, 0.60, 3.0), (PROMOTED, 0.70, 9.0), "dpo", "both are promoted, and its win rate is higher (0.700 against 0.600)"),
    ((PROMOTED, 0.70, 9.0), (PROMOTED, 0.60, 3.0), "ppo", "its win rate is higher (0.700 against 0.600)"),
    ((PROMOTED, 0.60, 3.0), (REJECTED, 0.90, 30.0), "ppo", "because DPO's is rejected"),
    ((REJECTED, 0.90, 30.0), (PROMOTED, 0.60, 3.0), "dpo", "because PPO's is rejected"),
    ((PROMOTED, 0.60, 3.0), (PROMOTED, 0.60, 2.0), "dpo", "its KL is lower (2.00 against 3.00 nats)"),
    ((PROMOTED, 0.60, 2.0), (PROMOTED, 0.60, 3.0), "ppo", "its KL is lower (2.00 against 3.00 nats)"),
    ((PROMOTED, 0.60, 3.0), (PROMOTED, 0.60, 3.0), "ppo", "with equal win rate and KL"),
    ((REJECTED, 0.40, 3.0), (REJECTED, 0.45, 3.0), "dpo", "both are rejected, and its win rate is higher"),
    ((REJECTED, None, 1.0), (REJECTED, 0.10, 9.0), "dpo", "(0.100 against none)"),
    ((REJECTED, None, 3.0), (REJECTED, None, 2.0), "dpo", "both are rejected with equal win rates"),
    ((REJECTED, None, 3.0), (REJECTED, None, 3.0), "ppo", "both are rejected, with equal win rate and KL"),
]  # fmt: skip


def outcome(method: Method, row: Row) -> Outcome:
    decision, win_rate, kl = row
    return Outcome(method=method, decision=decision, win_rate=win_rate, kl=kl)


@pytest.mark.parametrize(("ppo", "dpo", "method", "reason"), TABLE)
def test_the_better_one_by_hand(ppo: Row, dpo: Row, method: str, reason: str) -> None:
    outcomes = [outcome("ppo", ppo), outcome("dpo", dpo)]
    better = choose_better(outcomes)
    assert better.method == method
    assert reason in explain(better, outcomes)


def test_the_order_of_the_policies_does_not_matter() -> None:
    rows: list[Row] = [(d, w, k) for d in (PROMOTED, REJECTED) for w in (None, 0.2, 0.7) for k in (1.0, 2.0)]
    for ppo, dpo in itertools.product(rows, rows):
        a, b = outcome("ppo", ppo), outcome("dpo", dpo)
        assert choose_better([a, b]) == choose_better([b, a])
