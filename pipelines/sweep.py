"""The points of a sweep: which settings vary, and the parameters of every point, validated before anything runs."""

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from components.rlhf.config.explain import short_repr
from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from pipelines.settings import load_params

MAX_POINTS = 200
MAX_NAME = 80
DRAWS_PER_POINT = 50  # random points that repeat an earlier one are drawn again
DIGITS = 4  # significant digits of random numbers, which are part of names


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting that varies: over listed values (YAML texts), or from low to high."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_integer: bool = False

    def draw(self, generator: random.Random) -> str:
        """A value of the list, each with the same probability, or a number that is uniform in the range or in its logarithm."""
        if self.values:
            return generator.choice(self.values)
        if self.is_log:
            number = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        elif self.is_integer:
            number = float(generator.randint(int(self.low), int(self.high)))
        else:
            number = generator.uniform(self.low, self.high)
        if self.is_integer:
            return str(min(max(round(number), int(self.low)), int(self.high)))
        return repr(min(max(float(f"{number:.{DIGITS}g}"), self.low), self.high))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep. settings has the values that vary, as YAML texts by their keys."""

    name: str
    settings: Mapping[str, str]
    params: Params


def parse_grid(text: str) -> Axis:
    """KEY=VALUE,VALUE,...; commas within brackets and quotes belong to a value. Raises InputError."""
    key, values = _split(text, "--grid", "KEY=VALUE,VALUE")
    source = f"[{values}]"
    try:
        node = yaml.compose(source)
    except yaml.YAMLError:
        node = None
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(source):
        raise InputError(
            f"--grid {short_repr(text)}: the values are no list of YAML values; separate them with commas."
        )
    found = tuple(source[value.start_mark.index : value.end_mark.index] for value in node.value)
    if not found:
        raise InputError(f"--grid {short_repr(text)} has no values; write KEY=VALUE,VALUE.")
    if len(set(found)) < len(found):
        raise InputError(f"--grid {short_repr(text)} has a value twice; remove one.")
    return Axis(key=key, values=found)


def parse_range(text: str) -> Axis:
    """KEY=LOW..HIGH, or KEY=LOW..HIGH:log; two whole numbers without a point or an exponent make whole numbers. Raises InputError."""
    key, values = _split(text, "--range", "KEY=LOW..HIGH")
    number = r"[-+]?(?:\d+\.?(?:\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    match = re.fullmatch(rf"({number})\.\.({number})(:log)?", values.strip())
    if not match:
        raise InputError(f"--range {short_repr(text)} is no range; write KEY=LOW..HIGH, or KEY=LOW..HIGH:log.")
    low, high, is_log = float(match[1]), float(match[2]), bool(match[3])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"--range {short_repr(text)}: the range is empty; write the lower end first.")
    if is_log and low <= 0:
        raise InputError(f"--range {short_repr(text)}: a logarithmic range must be above 0.")
    is_integer = all(re.fullmatch(r"[-+]?\d+", end) for end in match.group(1, 2))
    return Axis(key=key, low=low, high=high, is_log=is_log, is_integer=is_integer)


def _split(text: str, option: str, form: str) -> tuple[str, str]:
    key, separator, values = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key.strip()):
        raise InputError(f"{option} {short_repr(text)} does not have the form {form}.")
    return key.strip(), values


def plan_points(
    params_file: Path, overrides: Sequence[str], axes: Sequence[Axis], *, num_random: int | None = None, seed: int = 0
) -> list[Point]:
    """The points of a sweep in the order of their runs: all combinations, or num_random different ones drawn with the seed.

    Raises InputError for settings that are invalid at any point, points that are equal, and sweeps without or with too many points.
    """
    _check_axes(overrides, axes)
    combinations = _random(axes, num_random, seed) if num_random is not None else _grid(axes)
    points: list[Point] = []
    seen: dict[str, int] = {}
    width = len(str(len(combinations)))
    short = short_keys([axis.key for axis in axes])
    for number, settings in enumerate(combinations, start=1):
        texts = [f"{key}={value}" for key, value in settings.items()]
        params = load_params(params_file, [*overrides, *texts])
        other = seen.setdefault(_result_settings(params), number)
        if other != number:
            raise InputError(
                f"Points {other} and {number} of the sweep ({', '.join(texts)}) would have the same result; vary other settings, or "
                "remove the values that are equal."
            )
        points.append(Point(name=f"{number:0{width}}-{_name(settings, short)}", settings=settings, params=params))
    return points


def _check_axes(overrides: Sequence[str], axes: Sequence[Axis]) -> None:
    if not axes:
        raise InputError("Nothing varies; name settings with --grid KEY=VALUE,VALUE, or --range KEY=LOW..HIGH.")
    varied = [axis.key for axis in axes]
    for number, key in enumerate(varied):
        for other in varied[:number]:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                both = f"{key} varies twice" if key == other else f"{other} and {key} vary the same setting"
                raise InputError(f"{both}; remove one of them.")
        for fixed in (override.partition("=")[0].strip() for override in overrides):
            if f"{fixed}.".startswith(f"{key}."):
                raise InputError(f"{fixed} is in --set, and {key} varies; remove one of them.")


def _grid(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """All combinations; the last axis varies fastest, so that neighbours have most in common."""
    ranges = [axis.key for axis in axes if not axis.values]
    if ranges:
        raise InputError(f"The range of {ranges[0]} has no end of points; say how many to draw, with --random N.")
    total = math.prod(len(axis.values) for axis in axes)
    if total > MAX_POINTS:
        raise InputError(
            f"The grid has {total} points, and at most {MAX_POINTS} are allowed; draw some with --random N."
        )
    if total < 2:
        raise InputError("The grid has only one point; add values, or use kfp-rlhf run.")
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def _random(axes: Sequence[Axis], num_points: int, seed: int) -> list[dict[str, str]]:
    if not 2 <= num_points <= MAX_POINTS:
        raise InputError(f"--random {num_points}: a sweep has 2 to {MAX_POINTS} points.")
    generator = random.Random(seed)
    found: dict[tuple[str, ...], None] = {}
    for _ in range(DRAWS_PER_POINT * num_points):
        found.setdefault(tuple(axis.draw(generator) for axis in axes))
        if len(found) == num_points:
            return [dict(zip((axis.key for axis in axes), values, strict=True)) for values in found]
    raise InputError(
        f"--random {num_points}: only {len(found)} different points were found; draw fewer, or remove --random to run all points of a grid."
    )


def _result_settings(params: Params) -> str:
    """The settings that could change a result: all but the name of the preset, and where results are."""
    unrelated = {"preset", "tracking", "storage"}
    return params.model_dump_json(exclude=unrelated)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each dotted key that no other key ends with; the whole key if there is none."""

    def is_unique(end: str) -> bool:
        return sum(f".{key}".endswith(f".{end}") for key in keys) == 1

    return {key: next(filter(is_unique, _ends(key)), key) for key in keys}


def _ends(key: str) -> Iterator[str]:
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[-length:])


def _name(settings: Mapping[str, str], short: Mapping[str, str]) -> str:
    """A name for folders, MLflow and Kubernetes labels alike, such as kl_coef-0.02_learning_rate-1e-6."""
    text = "_".join(f"{short[key]}-{value}" for key, value in settings.items())
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:MAX_NAME].strip("-._")
