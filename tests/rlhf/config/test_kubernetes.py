"""Texts that Kubernetes would refuse are refused when a params file is read."""

from typing import Any

import pytest

from components.rlhf.config.cluster import ClusterConfig, MatchExpression, Toleration

AWKWARD = ["it's", 'a"b', "a b", "a;b", "$(rm)", "{{x}}", "-a", "a-", "Ä", "a\tb", "x" * 501, "a/b/c", "a,b", "a=b"]


def at(place: str, text: str) -> dict[str, Any]:
    """Settings of the cluster with a text in one place."""
    profile = {
        "accelerator": {"accelerator": text},
        "node_selector key": {"node_selector": {text: "x"}},
        "node_selector": {"node_selector": {"pool": text}},
        "label key": {"labels": {text: "x"}},
        "label": {"labels": {"team": text}},
        "queue": {"queue": text},
        "scratch": {"scratch": {"size": "1Gi", "storage_class": text}},
        "toleration key": {"tolerations": [{"key": text}]},
        "toleration": {"tolerations": [{"key": "a", "operator": "Equal", "value": text}]},
        "affinity key": {"node_affinity": [{"match_expressions": [{"key": text, "operator": "Exists"}]}]},
        "affinity": {"node_affinity": [{"match_expressions": [{"key": "a", "values": [text]}]}]},
    }
    cluster: dict[str, Any] = {
        "service_account": {"service_account": text},
        "secret": {"secrets": {"mlflow": text}},
        "pull secret": {"image_pull_secrets": [text]},
        "claim": {"claims": {"/data": text}},
        "checkpoint_claim": {"checkpoint_claim": text},
        "runtime": {"runtime": text},
        "image": {"images": {"tools": text}},
        "variable": {"environment": {text: "1"}},
    }
    return cluster[place] if place in cluster else {"profiles": {"cpu": profile[place]}}


PLACES = [
    "accelerator", "node_selector key", "node_selector", "label key", "label", "queue", "scratch", "toleration key", "toleration",
    "affinity key", "affinity", "service_account", "secret", "pull secret", "claim", "checkpoint_claim", "runtime", "image", "variable",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_text_that_kubernetes_refuses_is_refused_at_parse_time(place: str) -> None:
    good = {"image": "kfp-rlhf/tools:0.1.0", "accelerator": "nvidia.com/gpu", "variable": "NCCL_DEBUG"}.get(place, "a1")
    ClusterConfig.model_validate(at(place, good))
    for text in AWKWARD:
        if place == "image" and text in ("a-", "a/b/c"):
            continue
        with pytest.raises(ValueError, match="of Kubernetes; write one like|it contains the character"):
            ClusterConfig.model_validate(at(place, text))


def test_labels_that_yaml_reads_as_numbers_are_texts() -> None:
    assert MatchExpression.model_validate({"key": "gpu.count", "operator": "Gt", "values": [4]}).values == ("4",)
    assert Toleration.model_validate({"key": "a", "operator": "Equal", "value": True}).value == "true"
    config = ClusterConfig.model_validate({"environment": {"A": 1.5}, "profiles": {"cpu": {"labels": {"a": ""}}}})
    assert config.environment == {"A": "1.5"} and config.profiles["cpu"].labels == {"a": ""}
