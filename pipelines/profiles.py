"""Profiles: the built-in ones, those of the params file merged over them, and the number of processes that follows."""

import functools
import reprlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from components.rlhf.config.cluster import PROCESS_STAGES
from components.rlhf.text.errors import InputError

BUILTIN_PATH = Path(__file__).parent / "profiles.yaml"
DEFAULT_PROFILE = "cpu"
YamlDict = dict[str, Any]


@functools.cache
def builtin_profiles() -> YamlDict:
    """The unmerged profiles of profiles.yaml, by name."""
    profiles: YamlDict = yaml.safe_load(BUILTIN_PATH.read_text(encoding="utf-8"))
    return profiles


def resolve_profiles(content: YamlDict) -> YamlDict:
    """The content of a params file with cluster.profiles merged, and num_processes set for stages with accelerators.

    A profile of the file is merged over the built-in one of the same name. Unused built-in profiles are left out. Raises InputError
    for an unknown profile.
    """
    cluster = content.get("cluster")
    if not isinstance(cluster, dict):  # missing, or an error that validation reports
        return content
    custom, stages = cluster.get("profiles") or {}, cluster.get("stages") or {}
    if not isinstance(custom, dict) or not isinstance(stages, dict):
        return content
    profiles = {name: _resolve_profile(name, custom, ()) for name in custom}
    used = {
        "cluster.default_profile": cluster.get("default_profile", DEFAULT_PROFILE),
        **{f"cluster.stages.{stage}": profile for stage, profile in stages.items()},
    }
    for key, name in used.items():
        profiles.setdefault(name, _resolve_profile(str(name), custom, (), key))
    content = content | {"cluster": cluster | {"profiles": profiles}}
    for stage in PROCESS_STAGES:
        if stage == "dpo" and not _runs_dpo(content):  # else the section would be there without having been given
            continue
        profile = profiles[stages.get(stage, used["cluster.default_profile"])]
        _set_processes(content, stage, _num_processes(profile) if isinstance(profile, dict) else 0)
    return content


def _runs_dpo(content: YamlDict) -> bool:
    policy = content.get("policy")
    return isinstance(policy, dict) and policy.get("method") in ("dpo", "both")


def _resolve_profile(name: str, custom: YamlDict, path: tuple[str, ...], key: str = "") -> Any:
    """A profile merged over the one that its `like` names. path holds the profiles whose `like` led here."""
    key = key or (f"cluster.profiles.{path[-1]}.like" if path else "")
    if name in path:
        raise InputError(f"cluster.profiles: {' is like '.join([*path, name])}, which is a cycle; remove one `like`.")
    if name not in custom and name not in builtin_profiles():
        raise InputError(f"{key} is {name}, which is not a profile{_hint(name, [*builtin_profiles(), *custom])}")
    layers = [layer[name] for layer in (builtin_profiles(), custom) if name in layer]
    if not all(isinstance(layer, dict) for layer in layers):
        return layers[-1]  # an error that validation reports
    merged: YamlDict = {}
    for layer in layers:
        merged |= layer
    like = merged.pop("like", None)
    if not isinstance(like, str | None):
        raise InputError(f"cluster.profiles.{name}.like is {reprlib.repr(like)}; it must be the name of a profile.")
    base = _resolve_profile(like, custom, (*path, name)) if like else {}
    return base | merged


def _hint(name: str, names: list[str]) -> str:
    matches = get_close_matches(name, names, n=1)
    return f"; did you mean {matches[0]}?" if matches else f"; profiles: {', '.join(sorted(set(names)))}."


def _num_processes(profile: YamlDict) -> int:
    """One process per accelerator, and without accelerators one per node; 0 if that is the default, or left to validation."""
    numbers = profile.get("num_nodes", 1), profile.get("num_accelerators", 0)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        return 0
    nodes, accelerators = numbers
    return nodes * accelerators if accelerators else nodes if nodes > 1 else 0


def _set_processes(content: YamlDict, stage: str, num_processes: int) -> None:
    """Set num_processes to what follows from the profile, unless the file sets it; validation then requires them to be equal."""
    section, processes = content.get(stage) or {}, {"num_processes": num_processes}
    if not num_processes or not isinstance(section, dict):
        return
    if stage == "evaluation":
        content[stage] = processes | section
        return
    training = section.get("training")
    training = {} if training is None else training
    if isinstance(training, dict):
        content[stage] = section | {"training": processes | training}
