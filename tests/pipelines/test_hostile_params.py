"""A corrupt params file is loaded, or rejected with one sentence that names the problem and its location."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import parse_json
from pipelines.settings import dump_yaml, load_params
from tests.support.hostile_input import result_or_refusal

FOLDER = Path(__file__).resolve().parents[2] / "pipelines/params"
TINY, LARGE = (FOLDER / name for name in ("tiny.yaml", "llama3_8b_8gpu.yaml"))
GOOD = "data:\n  prompts: {path: p.jsonl}\n  preferences: {path: q.jsonl}\n  demonstrations: {path: d.jsonl}\n"
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = (
    st.sampled_from(
        [None, True, -1, 0, 10**400, -(10**30), 2**63, float("nan"), float("inf"), -0.0, 1e308, "", " ", "no", "nan", "1e5", "~", "*", "..",
         "a\nb", "\x00", "\ud800", "\u2028", "x" * 5000, "s3://", "://@", "https://u:p@h", [], {}, [[]], {"like": "cpu"}, {1: 2}]
    )
    | st.text(max_size=12)
    | st.integers()
    | st.floats()
)  # fmt: skip
VALUE = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)


def key_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(location for key, child in inner for location in key_paths(child, (*path, key)))]


CONTENTS = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (TINY, LARGE)}
# All keys, including those that the file leaves at their default.
CONTENTS[TINY] = json.loads(load_params(TINY).canonical_json())
KEY_PATHS = {path: key_paths(content)[1:] for path, content in CONTENTS.items()}


def read(text: bytes, folder: Path, *overrides: str) -> Params | None:
    """The params, or None if they are rejected with one sentence; params that load survive a dump and a second load."""
    path = folder / "params.yaml"
    path.write_bytes(text)
    params: Params | None = result_or_refusal(lambda: load_params(path, overrides))
    if params is not None:
        parse_json(params.canonical_json())
        path.write_text(dump_yaml(params), encoding="utf-8")
        assert load_params(path) == params
    return params


@FUZZ
@given(data=st.data())
def test_arbitrary_values_at_any_key(tmp_path: Path, data: st.DataObject) -> None:
    source = data.draw(st.sampled_from([TINY, LARGE]))
    content = copy.deepcopy(CONTENTS[source])
    key_path = data.draw(st.sampled_from(KEY_PATHS[source]))
    parent = content
    for key in key_path[:-1]:
        parent = parent[key]
    match data.draw(st.sampled_from(["replace", "replace", "drop", "add", "rename"])):
        case "replace":
            parent[key_path[-1]] = data.draw(VALUE)
        case "drop":
            del parent[key_path[-1]]
        case "add" if isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8) | st.integers() | st.none())] = data.draw(VALUE)
        case "rename" if isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8))] = parent.pop(key_path[-1])
    read(yaml.dump(content, allow_unicode=False).encode(), tmp_path)


@FUZZ
@given(data=st.data())
def test_corrupt_lines_and_bytes(tmp_path: Path, data: st.DataObject) -> None:
    lines = TINY.read_bytes().splitlines(keepends=True)[5:]
    line = data.draw(st.integers(0, len(lines) - 1))
    match data.draw(st.sampled_from(["drop", "double", "cut", "indent", "bytes"])):
        case "drop":
            del lines[line]
        case "double":
            lines.insert(data.draw(st.integers(0, len(lines))), lines[line])
        case "cut":
            lines[line] = lines[line][: data.draw(st.integers(0, len(lines[line])))]
        case "indent":
            lines[line] = b" " * data.draw(st.integers(1, 4)) + lines[line]
        case "bytes":
            lines[line] = lines[line][:-1] + data.draw(st.binary(max_size=6)) + b"\n"
    read(b"".join(lines), tmp_path)


@FUZZ
@given(
    st.text(max_size=30),
    st.sampled_from(["seed", "preset", "ppo", "cluster.stages.ppo", "cluster.profiles.cpu.like", "a.b", ""]),
)
def test_arbitrary_overrides(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(GOOD, encoding="utf-8")
    for override in (f"{key}={text}", text):
        result_or_refusal(lambda override=override: load_params(path, [override]))


def load_error(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError) as caught:
        load_params(path)
    result_or_refusal(lambda: load_params(path))
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("seed: 1\nseed: 2\n", ":6 is not YAML (the key 'seed' is duplicated)."),
        ("ppo: {kl_coef: 0.1, kl_coef: 0.2}\n", ":5 is not YAML (the key 'kl_coef' is duplicated)."),
        ("preset: \"a\\0b\"\n", ":5 is not YAML (a value contains the character '\\x00')."),
        ("preset: \"a\\nb\"\n", ": preset: it contains the character '\\n'; remove it."),
        ("preset: &a [*a]\n", ":5 is not YAML (an alias contains itself)."),
        ("preset: 2020-13-45\n", " is not YAML (month must be in 1..12)."),
        ("preset: !!python/object/apply:os.system [id]\n", ":5 is not YAML (could not determine a constructor"),
        ("seed: .nan\n", ": seed is nan: input should be a finite number."),
        ("gate: {max_kl: .nan}\n", ": gate.max_kl is nan: input should be a finite number."),
        ("gate: {max_kl: .inf}\n", ": gate.max_kl is inf: input should be a finite number."),
        ("gate: {min_win_rate: .nan}\n", ": gate.min_win_rate is nan: "),
        ("ppo: {num_iterations: 1" + "0" * 30 + "}\n", ": ppo.num_iterations is 1" + "0" * 30 + ": input should be less than "),
        ("ppo: [1]\n", ": ppo is [1]: expected a section with the keys "),
        ("preset: []\n", ": preset is []: input should be a valid string."),
        ("model: {trust_remote_code: true}\n", ": model.trust_remote_code is not a parameter; "),
    ],
)  # fmt: skip
def test_error_names_problem_and_location(tmp_path: Path, more: str, message: str) -> None:
    assert load_error(tmp_path, GOOD + more).startswith(message)


def test_long_value_is_shortened_in_the_error(tmp_path: Path) -> None:
    message = load_error(tmp_path, GOOD + f"seed: {'x' * 900_000}\n")
    assert message.startswith(": seed is 'xxx") and "(900,002 characters)" in message and len(message) < 400


def test_number_of_reported_mistakes_is_limited(tmp_path: Path) -> None:
    message = load_error(tmp_path, GOOD + "".join(f"wrong{n}: 1\n" for n in range(1000)))
    assert message.endswith("; and 995 more.") and len(message) < 2000


def test_number_with_thousands_of_digits_is_rejected(tmp_path: Path) -> None:
    assert "is not YAML (Exceeds the limit" in load_error(tmp_path, GOOD + f"seed: {'9' * 5000}\n")


BOMBS = {
    "aliases": GOOD + "a: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40)),
    "merges": GOOD + "a: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 40)),
    "deep": GOOD + "a: " + "[" * 100_000,
    "deep mapping": GOOD + "a: " + "{a: " * 20_000,
    "long": GOOD + "a: " + "x" * 2**20,
    "many": GOOD + "a: [" + "1," * 60_000 + "]",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bomb_is_rejected_within_seconds(tmp_path: Path, name: str) -> None:
    started = time.monotonic()
    message = load_error(tmp_path, BOMBS[name])
    assert (
        "expand to more than 50,000 values" in message
        or "nested too deeply" in message
        or "longer than 1 MiB" in message
    )
    assert time.monotonic() - started < 60  # a second or two on an idle machine


def test_10_gb_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "params.yaml").open("wb") as file:  # sparse
        file.truncate(10 * 10**9)
    with pytest.raises(InputError, match="longer than 1 MiB, too long for a params file"):
        load_params(tmp_path / "params.yaml")
