"""The points of a sweep are those of its axes, each once, and every mistake is one sentence before anything runs."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.text.errors import InputError
from pipelines.sweep import Axis, parse_grid, parse_range, plan_points, short_keys
from tests.support.toy_pipeline import toy_params, write_data, write_params


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("points")
    return write_params(folder / "toy.yaml", toy_params(folder / "model", write_data(folder)))


def test_grid_has_all_combinations_and_the_last_setting_varies_fastest(toy: Path) -> None:
    axes = [parse_grid("sft.training.learning_rate=1e-3,1e-4"), parse_grid("ppo.kl_coef=0.1,0.2,0.3")]
    points = plan_points(toy, ["seed=7"], axes)
    assert [(p.params.sft.training.learning_rate, p.params.ppo.kl_coef) for p in points] == [
        (1e-3, 0.1), (1e-3, 0.2), (1e-3, 0.3), (1e-4, 0.1), (1e-4, 0.2), (1e-4, 0.3)
    ]  # fmt: skip
    assert {point.params.seed for point in points} == {7}
    assert points[3].name == "4-learning_rate-1e-4_kl_coef-0.1"
    assert points[3].settings == {"sft.training.learning_rate": "1e-4", "ppo.kl_coef": "0.1"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2", ("1", "2")),
        ("a= x , 'y, z',\"w\"", ("x", "'y, z'", '"w"')),
        ("a=[1, 2],[],{b: 1, c: [2]}", ("[1, 2]", "[]", "{b: 1, c: [2]}")),
        ("a=null,1e-6,https://x/y", ("null", "1e-6", "https://x/y")),
        ("a=1,", ("1",)),
    ],
)
def test_values_of_a_grid_are_yaml_separated_by_commas(text: str, values: tuple[str, ...]) -> None:
    assert parse_grid(text).values == values


@pytest.mark.parametrize(
    "text", ["a", "=1,2", "a b=1", "a.=1", "a=", "a=1,,2", "a=[1,2", "a=1],[2", "a='1,2", "a=1,1", "a=1,2 #x"]
)
def test_grid_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--grid"):
        parse_grid(text)


@pytest.mark.parametrize(
    ("text", "low", "high", "is_log", "is_integer"),
    [
        ("a=1..5", 1, 5, False, True),
        ("a=-1..5:log", None, None, True, True),
        ("a=0.5..5", 0.5, 5, False, False),
        ("a=1e-6..1e-4:log", 1e-6, 1e-4, True, False),
        ("a=-2..-1.5", -2, -1.5, False, False),
        ("a=2..1", None, None, False, True),
        ("a=1..1", None, None, False, True),
        ("a=0..1:log", None, None, True, True),
        ("a=1", None, None, False, False),
        ("a=1..x", None, None, False, False),
        ("a=1..1e999", None, None, False, False),
        ("a=1..2:exp", None, None, False, False),
    ],
)
def test_range(text: str, low: float | None, high: float | None, is_log: bool, is_integer: bool) -> None:
    if low is None:
        with pytest.raises(InputError, match="--range"):
            parse_range(text)
        return
    assert parse_range(text) == Axis(key="a", low=low, high=high or 0, is_log=is_log, is_integer=is_integer)


class Fixed:
    """A generator of random numbers that are all at the same fraction of their range."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def uniform(self, low: float, high: float) -> float:
        return low + self.fraction * (high - low)

    def randint(self, low: int, high: int) -> int:
        return low + int(self.fraction * (high - low))


@pytest.mark.parametrize(
    ("text", "middle"), [("a=1..3", "2"), ("a=1.0..4", "2.5"), ("a=1e-6..1e-4:log", "1e-05"), ("a=1..100:log", "10")]
)
def test_middle_of_a_range(text: str, middle: str) -> None:
    assert parse_range(text).draw(Fixed(0.5)) == middle  # type: ignore[arg-type]


@given(
    low=st.floats(1e-9, 1e9), factor=st.floats(1.001, 1e6), fraction=st.floats(0, 1), is_log=st.booleans(), is_integer=st.booleans()
)  # fmt: skip
def test_random_number_is_in_its_range_with_few_digits(
    low: float, factor: float, fraction: float, is_log: bool, is_integer: bool
) -> None:
    high = low * factor
    if is_integer:
        low, high = float(math.ceil(low)), float(math.ceil(high) + 1)
    axis = Axis(key="a", low=low, high=high, is_log=is_log, is_integer=is_integer)
    text = axis.draw(Fixed(fraction))  # type: ignore[arg-type]
    assert low <= float(text) <= high
    assert text.isdigit() if is_integer else float(text) in (low, high, float(f"{float(text):.4g}"))


def test_random_points_differ_and_are_those_of_the_seed(toy: Path) -> None:
    axes = [parse_range("ppo.kl_coef=0.001..1.0:log"), parse_range("sft.max_steps=1..3"), parse_grid("seed=0,1")]

    def settings(seed: int) -> list[dict[str, str]]:
        return [dict(point.settings) for point in plan_points(toy, [], axes, num_random=12, seed=seed)]

    first = settings(0)
    assert settings(0) == first != settings(1)
    assert len({tuple(point.values()) for point in first}) == 12
    assert {point["sft.max_steps"] for point in first} == {"1", "2", "3"}
    assert {point["seed"] for point in first} == {"0", "1"}
    assert sum(float(point["ppo.kl_coef"]) < 0.0316 for point in first) in range(
        3, 10
    )  # half of them, in the logarithm


@pytest.mark.parametrize(
    ("overrides", "grids", "ranges", "num_random", "message"),
    [
        ([], [], [], None, "Nothing varies"),
        ([], [], [], 3, "Nothing varies"),
        ([], ["ppo.kl_coef=1"], [], None, "only one point"),
        ([], [f"seed={','.join(map(str, range(15)))}", f"sft.max_steps={','.join(map(str, range(1, 15)))}"], [], None, "210 points"),
        ([], ["seed=0,1"], [], 201, "2 to 200"),
        ([], ["seed=0,1"], [], 1, "2 to 200"),
        ([], ["seed=0,1"], [], 3, "only 2 different"),
        ([], [], ["ppo.kl_coef=0..1"], None, "--random N"),
        ([], ["ppo.kl_coeff=1,2"], [], None, "did you mean ppo.kl_coef"),
        ([], ["ppo.kl_coef=1,x"], [], None, "ppo.kl_coef"),
        ([], ["ppo.kl_coef=1,-1"], [], None, "ppo.kl_coef"),
        ([], ["ppo.kl_coef=0.1,0.10"], [], None, "Points 1 and 2"),
        ([], ["ppo.kl_coef=0.3,0.1,1e-1"], [], None, "Points 2 and 3"),
        ([], ["tracking.experiment=a,b"], [], None, "same result"),
        ([], ["preset=custom,custom2"], [], None, "preset"),
        ([], ["seed=0,1", "seed=2,3"], [], None, "seed varies twice"),
        ([], ["ppo={},{kl_coef: 1}", "ppo.kl_coef=2,3"], [], None, "vary the same setting"),
        (["ppo.kl_coef=1"], ["ppo.kl_coef=2,3"], [], None, "is in --set"),
        (["ppo.kl_coef=1"], ["ppo={},{kl_coef: 1}"], [], None, "is in --set"),
    ],
)  # fmt: skip
def test_mistake_is_one_sentence(
    toy: Path, overrides: list[str], grids: list[str], ranges: list[str], num_random: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        axes = [*map(parse_grid, grids), *map(parse_range, ranges)]
        plan_points(toy, overrides, axes, num_random=num_random)
    assert "\n" not in str(error.value)


def test_sections_that_begin_alike_are_different_settings(toy: Path) -> None:
    assert len(plan_points(toy, ["ppo.kl_coef=1"], [parse_grid("ppo.kl_clamp=1,2")])) == 2


def test_short_keys_are_the_shortest_ends_that_differ() -> None:
    assert short_keys(
        ["sft.training.learning_rate", "ppo.training.learning_rate", "ppo.kl_coef", "seed", "a.seed"]
    ) == {
        "sft.training.learning_rate": "sft.training.learning_rate",
        "ppo.training.learning_rate": "ppo.training.learning_rate",
        "ppo.kl_coef": "kl_coef",
        "seed": "seed",
        "a.seed": "a.seed",
    }


def test_names_are_safe_in_folders_filters_labels_and_shells(toy: Path) -> None:
    source = "it''s; rm -rf /../`x` $HOME " + "é" * 200
    points = plan_points(toy, [], [parse_grid(f"model.source='{source}','{source}!'")])
    assert [point.params.model.source for point in points] == [source.replace("''", "'") + end for end in ("", "!")]
    for point in points:
        assert re.fullmatch(r"[12]-source[A-Za-z0-9._-]{0,80}[A-Za-z0-9]", point.name)
