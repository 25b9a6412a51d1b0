"""Profiles: those that come with this, those of the params file laid over them, and what a stage's profile says of its processes."""

import functools
import reprlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from components.rlhf.config.cluster import TRAINING_STAGES
from components.rlhf.text.errors import InputError

BUILTIN = Path(__file__).parent / "profiles.yaml"
DEFAULT = "cpu"
Data = dict[str, Any]


@functools.cache
def builtin_profiles() -> Data:
    """The profiles of profiles.yaml by name, as they are written there."""
    profiles: Data = yaml.safe_load(BUILTIN.read_text(encoding="utf-8"))
    return profiles


def resolve_profiles(content: Data) -> Data:
    """The content of a params file with cluster.profiles complete, and num_processes of every stage that has accelerators.

    A profile of the file with a name of ours changes that one. Profiles of ours that no stage uses are left out. Raises InputError
    for a profile that is not there.
    """
    cluster = content.get("cluster")
    if not isinstance(cluster, dict):  # none, or a mistake that validation names
        return content
    own, stages = cluster.get("profiles") or {}, cluster.get("stages") or {}
    if not isinstance(own, dict) or not isinstance(stages, dict):
        return content
    known = {name: _resolve_profile(name, own, ()) for name in own}
    used = {
        "cluster.default_profile": cluster.get("default_profile", DEFAULT),
        **{f"cluster.stages.{stage}": profile for stage, profile in stages.items()},
    }
    for key, name in used.items():
        known.setdefault(name, _resolve_profile(str(name), own, (), key))
    content = content | {"cluster": cluster | {"profiles": known}}
    for stage in TRAINING_STAGES:
        profile = known[stages.get(stage, used["cluster.default_profile"])]
        _set_processes(content, stage, profile.get("num_accelerators", 0) if isinstance(profile, dict) else 0)
    return content


def _resolve_profile(name: str, own: Data, path: tuple[str, ...], key: str = "") -> Any:
    """A profile with what it is like under it. path is the profiles that led here by their `like`."""
    where = key or (f"cluster.profiles.{path[-1]}.like" if path else "")
    if name in path:
        raise InputError(f"cluster.profiles: {' is like '.join([*path, name])}, which goes round; take one `like` out.")
    if name not in own and name not in builtin_profiles():
        raise InputError(f"{where} is {name}, which is no profile{_hint(name, [*builtin_profiles(), *own])}")
    layers = [layer[name] for layer in (builtin_profiles(), own) if name in layer]
    if not all(isinstance(layer, dict) for layer in layers):
        return layers[-1]  # validation says what is wrong with it
    merged: Data = {}
    for layer in layers:
        merged |= layer
    like = merged.pop("like", None)
    if not isinstance(like, str | None):
        raise InputError(f"cluster.profiles.{name}.like is {reprlib.repr(like)}; write the name of a profile.")
    under = _resolve_profile(like, own, (*path, name)) if like else {}
    return under | merged


def _hint(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; profiles: {', '.join(sorted(set(names)))}."


def _set_processes(content: Data, stage: str, num_accelerators: Any) -> None:
    """The number of GPUs has one source: num_processes follows the profile unless the file says it, and then must agree."""
    section = content.get(stage) or {}
    training = section.get("training") if isinstance(section, dict) else None
    training = {} if training is None else training
    if num_accelerators and isinstance(section, dict) and isinstance(training, dict):
        content[stage] = section | {"training": {"num_processes": num_accelerators} | training}
