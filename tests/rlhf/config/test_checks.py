"""Settings of the checks of the gate: what they need, and combinations that cannot be."""

from typing import Any

import pytest

from components.rlhf.config.checks import ChecksStageConfig
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.params import Params
from tests.rlhf.config.test_settings import error_message, minimal_params

PERPLEXITY = {"kind": "perplexity", "max_increase": 0.1}
PROMPTS = {"kind": "prompts", "prompts": ["a", "b"], "pattern": "x", "max_increase": 0.9}
ENDPOINT = {"url": "http://judge:8000/v1", "model": "m", "rubric": "10: kind."}
TASKS = {"kind": "lm_eval", "tasks": ["arc_easy"], "max_drop": 0.02}


def content_of(*checks: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return minimal_params() | {"gate": {"checks": list(checks)}} | sections


def params_of(*checks: dict[str, Any], **sections: Any) -> Params:
    return Params.model_validate(content_of(*checks, **sections))


def without(section: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in names}


def test_each_kind_is_accepted_with_its_bounds() -> None:
    params = params_of(PERPLEXITY, PROMPTS | {"max_decrease": 0.8}, TASKS)
    bounds = [check.bounds for check in params.gate.checks]
    assert bounds == [{"max_increase": 0.1}, {"max_increase": 0.9, "max_decrease": 0.8}, {"max_drop": 0.02}]
    assert [check.title for check in params.gate.checks] == ["perplexity", "prompts", "lm_eval"]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"kind": "toxicity"}, "kind is not one of perplexity, prompts, lm_eval"),
        ({"kind": "perplexity"}, "gate.checks.0.max_increase is missing"),
        (PROMPTS | {"pattern": ""}, "gate.checks.0.pattern"),
        (PERPLEXITY | {"max_incraese": 1}, "did you mean gate.checks.0.max_increase?"),
        (without(PROMPTS, "prompts"), "set one of prompts_file and prompts"),
        (PROMPTS | {"prompts_file": "x.txt"}, "set one of prompts_file and prompts"),
        (without(PROMPTS, "pattern"), "set one of pattern and endpoint"),
        (PROMPTS | {"endpoint": ENDPOINT}, "set one of pattern and endpoint"),
        (without(PROMPTS, "pattern") | {"endpoint": without(ENDPOINT, "rubric")}, "endpoint has no rubric"),
        (PROMPTS | {"pattern": "("}, "it is no regular expression"),
        (PROMPTS | {"threshold": 7}, "nothing is graded without endpoint"),
        (without(PROMPTS, "max_increase"), "it has no bound"),
        (PROMPTS | {"prompts": ["a", "a"]}, "a prompt is there twice"),
        (PROMPTS | {"prompts": ["x" * 33_000]}, "bytes as JSON, and 32,768 are possible"),
        (TASKS | {"tasks": []}, "gate.checks.0.tasks"),
        (TASKS | {"include_path": "tasks"}, "is a folder in code.path, which is not set"),
        (TASKS | {"include_path": "/tasks"}, "gate.checks.0.include_path"),
    ],
)
def test_check_that_cannot_be_is_refused(check: dict[str, Any], message: str) -> None:
    assert message in error_message(content_of(check))


# With n of n hits, Wilson's interval at 95% ends at n / (n + 3.8415), and that of no difference at 1.96 / (n + 2).
@pytest.mark.parametrize(
    ("num", "bound", "needed"),
    [
        (34, {"min_rate": 0.9}, 35),
        (35, {"min_rate": 0.9}, None),
        (72, {"max_rate": 0.05}, 73),
        (73, {"max_rate": 0.05}, None),
        (17, {"max_increase": 0.1}, 18),
        (18, {"min_rate": 0.5, "max_increase": 0.1}, None),
        (37, {"max_decrease": 0.05}, 38),
    ],
)
def test_bound_that_no_policy_can_keep_is_refused(num: int, bound: dict[str, float], needed: int | None) -> None:
    check = {"kind": "prompts", "prompts": [str(n) for n in range(num)], "pattern": "x", **bound}
    if needed is None:
        params_of(check)
    else:
        message = error_message(content_of(check))
        assert "which no policy can keep" in message and message.endswith(f"give at least {needed} prompts.")


@pytest.mark.parametrize("bound", ["min_rate", "max_rate"])
def test_rate_without_any_exception_is_never_certain(bound: str) -> None:
    check = PROMPTS | {bound: 1.0 if bound == "min_rate" else 0.0}
    assert "which no policy can keep" in error_message(content_of(check))


def test_two_checks_need_two_names() -> None:
    assert "two checks are named prompts" in error_message(content_of(PROMPTS, PROMPTS))
    params_of(PROMPTS, PROMPTS | {"name": "others"})


def test_perplexity_needs_demonstrations() -> None:
    content = content_of(PERPLEXITY, sft={"use": "/models/mine"})
    del content["data"]["demonstrations"]
    assert "there are none; set data.demonstrations" in error_message(content)


def test_checks_run_on_one_node_with_the_profile_of_evaluation() -> None:
    profiles = {"cpu": {}, "big": {"num_accelerators": 2}, "wide": {"num_nodes": 2}}
    cluster = {"stages": {"evaluation": "big"}, "profiles": profiles}
    evaluation = {"num_processes": 2}
    assert params_of(PERPLEXITY, cluster=cluster, evaluation=evaluation).cluster.profile_name("checks") == "big"
    own = cluster | {"stages": {"evaluation": "big", "checks": "cpu"}}
    assert params_of(PERPLEXITY, cluster=own, evaluation=evaluation).cluster.profile_name("checks") == "cpu"
    wide = {"launcher": "trainjob", "stages": {"evaluation": "wide"}, "profiles": profiles}
    params_of(cluster=wide, evaluation=evaluation)  # a run without checks does not look for their profile
    assert "set cluster.stages.checks to a profile with one" in error_message(
        content_of(PERPLEXITY, cluster=wide, evaluation=evaluation)
    )


def test_run_has_the_stage_only_with_checks() -> None:
    assert not params_of().runs("checks") and params_of(PERPLEXITY).runs("checks")


def test_graders_are_asked_by_the_stage_checks_alone() -> None:
    params = params_of(PERPLEXITY, without(PROMPTS, "pattern") | {"endpoint": ENDPOINT})
    assert [each.url for each in params.asked_by("checks")] == ["http://judge:8000/v1"]
    assert params.asked_by("evaluation") == () and len(params.all_asked) == 1 and params.keeps_answers


def test_evaluation_gets_the_names_of_checks_and_not_their_texts() -> None:
    evaluation = params_of(PROMPTS, PERPLEXITY).stage(EvaluationStageConfig)
    assert evaluation.check_names == ("prompts", "perplexity") and evaluation.gate.checks == ()


def test_checks_sample_and_estimate_as_the_evaluation() -> None:
    params = params_of(PROMPTS, evaluation={"sampling": {"temperature": 0.3}, "num_bootstrap": 7, "confidence": 0.8})
    stage = params.stage(ChecksStageConfig)
    assert (stage.sampling.temperature, stage.num_bootstrap, stage.confidence) == (0.3, 7, 0.8)
    assert stage.checks == params.gate.checks
