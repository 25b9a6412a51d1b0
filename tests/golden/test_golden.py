"""Tests components/rlhf/maths against numbers computed by the reference systems' own functions.

RLHF_GOLDEN_DIR may name a second folder of JSON files with the same schema, whose cases are added.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.golden import experience, losses, tokens
from tests.golden.cases import Case, Params, UnknownVariant, all_cases, check

Compose = Callable[[Case], dict[str, Any]]

# family -> its composition, and the supported sources.
COMPOSITIONS: dict[str, tuple[Compose, set[str]]] = {
    "kl_estimators": (experience.kl_estimators, {"openrlhf_v0.5.5", "openrlhf_head", "verl", "trl"}),
    "adaptive_kl": (
        experience.adaptive_kl,
        {"openrlhf_v0.5.5", "openrlhf_head", "verl", "trl_v0.11.4", "lmhp_details", "openai"},
    ),
    "token_rewards": (experience.rewards, {"openrlhf_v0.5.5", "openrlhf_head", "verl", "trl", "nplus"}),
    "gae": (experience.gae, {"openrlhf_v0.5.5", "openrlhf_head", "verl", "trl"}),
    "whitening": (experience.whitening, {"openrlhf_v0.5.5", "openrlhf_head", "verl", "trl", "nplus"}),
    "group_advantages": (experience.group_advantages, {"openrlhf_head", "verl"}),
    "importance_correction": (losses.importance, {"openrlhf_head", "verl"}),
    "policy_loss": (losses.policy, {"openrlhf_v0.5.5", "openrlhf_head", "verl", "trl"}),
    "value_loss": (losses.value, {"openrlhf_v0.5.5", "openrlhf_head", "verl", "trl"}),
    "reward_model_loss": (losses.reward_model, {"openrlhf_v0.5.5", "trl"}),
    "preferences": (losses.preferences, {"trl"}),
    "logprobs": (tokens.logprobs, {"openrlhf_v0.5.5", "openrlhf_head", "trl"}),
    "masks": (tokens.masks, {"openrlhf_v0.8.0", "openrlhf_head", "trl", "verl"}),
}

# Families of a source that are skipped, with the reason.
SKIPPED: dict[tuple[str, str], str] = {
    ("masks", "openrlhf_v0.5.5"): "compares ids and overwrites a sampled token with EOS: unsupported by design",
}

CASES = all_cases()


def run(case: Case) -> None:
    """Raise unless the case's numbers are reproduced."""
    if case.family not in COMPOSITIONS:
        raise UnknownVariant(f"unknown family: {case.family}")
    compose, origins = COMPOSITIONS[case.family]
    if case.origin not in origins:
        raise UnknownVariant(f"unknown source for {case.family}: {case.source}")
    check(case, compose(case))


@pytest.mark.parametrize("case_id", CASES)
def test_golden(case_id: str) -> None:
    case = CASES[case_id]
    if (case.family, case.origin) in SKIPPED:
        pytest.skip(SKIPPED[case.family, case.origin])
    run(case)


def example_case() -> Case:
    case = CASES["policy_loss/worked_example/openrlhf_v0.5.5"]
    return replace(case, params=Params(dict(case.params)))


def test_packaged_vectors_are_complete() -> None:
    families = {case_id.split("/")[0] for case_id in CASES}
    assert families >= COMPOSITIONS.keys()
    assert len(CASES) >= 525


def test_wrong_number_fails() -> None:
    case = example_case()
    with pytest.raises(AssertionError, match="loss"):
        run(replace(case, expected=case.expected | {"loss": case.expected["loss"] + 1e-6}))


def test_nan_fails() -> None:
    case = example_case()
    with pytest.raises(AssertionError, match="loss"):
        run(replace(case, expected=case.expected | {"loss": float("nan")}))


@pytest.mark.parametrize(
    "change",
    [
        {"family": "something_new"},
        {"source": "something new"},
        {"source": "openai/lm-human-preferences cbfd210b"},
        {"expected": {"something_new": 0.0}},
        {"params": Params({"clip_eps": 0.2, "aggregation": "seq-mean-token-mean", "something_new": 1})},
        {"params": Params({"clip_eps": 0.2, "aggregation": "something-new"})},
    ],
    ids=["family", "source", "source for the family", "expected key", "parameter", "aggregation"],
)
def test_unknown_variant_fails(change: dict[str, Any]) -> None:
    with pytest.raises(UnknownVariant):
        run(replace(example_case(), **change))
