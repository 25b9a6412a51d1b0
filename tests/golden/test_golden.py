"""Tests components/rlhf/maths against numbers computed by the reference systems' own functions.

RLHF_GOLDEN_DIR may name a second folder of JSON files with the same schema, whose cases are added.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

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


HOLES = (1, 3)  # columns before which tokens of an environment are inserted
HOLE = math.nan


def widened(rows: list[list[Any]], filling: Any) -> list[list[Any]]:
    """Rows of T columns with one column of the filling before each of HOLES, and two before the first."""
    places = [place for place in (HOLES[0], *HOLES) if place < len(rows[0])]
    return [[value for t, own in enumerate(row) for value in [*[filling] * places.count(t), own]] for row in rows]


def with_holes(case: Case) -> Case:
    """The case with tokens of an environment among those of the model, which must not change its numbers."""
    width = len(case.inputs["mask"][0])

    def widen(name: str, value: Any) -> Any:
        if not (isinstance(value, list) and isinstance(value[0], list) and len(value) == len(case.inputs["mask"])):
            return value
        if len(value[0]) != width:
            return value
        return widened(value, 0 if name.startswith("mask") else -7 if isinstance(value[0][0], int) else HOLE)

    inputs = {name: widen(name, value) for name, value in case.inputs.items()}
    return replace(case, inputs=inputs, params=Params(dict(case.params)))


def can_have_holes(case: Case) -> bool:
    """Whether the source's numbers do not depend on columns outside the mask, as those of a mean over all columns do."""
    if "mask" not in case.inputs or (case.family, case.origin) in SKIPPED:
        return False
    over_columns = case.params.get("aggregation") == "seq-mean-token-sum-norm" and not case.params.get(
        "loss_scale_factor"
    )
    gap_is_step = case.family == "gae" and case.origin == "openrlhf_v0.5.5" and case.name.startswith("gap")
    return not over_columns and not gap_is_step


@pytest.mark.parametrize("case_id", [case_id for case_id, case in all_cases().items() if can_have_holes(case)])
def test_golden_with_holes(case_id: str) -> None:
    """nan at tokens of the environment changes no number at the tokens of the model, and gets no gradient."""
    case = with_holes(CASES[case_id])
    results = COMPOSITIONS[case.family][0](case)
    columns = widened([list(range(len(CASES[case_id].inputs["mask"][0])))], -1)[0]
    own, holes = ([t for t, column in enumerate(columns) if (column < 0) == is_hole] for is_hole in (False, True))
    for name, value in results.items():
        if isinstance(value, torch.Tensor) and value.shape == (len(case.inputs["mask"]), len(columns)):
            results[name] = value[:, own]
            assert not name.startswith("grad") or not value[:, holes].any(), name
    check(replace(case, inputs=CASES[case_id].inputs), results)


def test_most_golden_cases_of_the_loss_have_holes() -> None:
    counted = Counter(case.family for case in all_cases().values() if can_have_holes(case))
    assert sum(counted.values()) >= 260, counted
    assert {
        "gae",
        "token_rewards",
        "whitening",
        "kl_estimators",
        "policy_loss",
        "value_loss",
    } <= counted.keys()


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
