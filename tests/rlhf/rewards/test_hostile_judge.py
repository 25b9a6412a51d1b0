"""A manipulated judge artifact: it loads and gives finite scores, or is rejected with a one-line error."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from components.rlhf.config.judge import LinearJudge as LinearConfig
from components.rlhf.data.records import RatedText
from components.rlhf.rewards.linear import FEATURES, WEIGHTS, fit_to_ratings, load_linear_judge
from components.rlhf.text.errors import InputError
from tests.support.hostile_input import result_or_refusal

FUZZ = settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(params=["words", "both"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    rated = [
        RatedText(prompt="a film", completion=f" that is {word}", rating=rating)
        for word, rating in (("good", 2.0), ("bad", -2.0))
    ]
    fit_to_ratings(rated, LinearConfig(features=request.param)).save(tmp_path)
    return tmp_path


def check(folder: Path) -> None:
    judge = result_or_refusal(lambda: load_linear_judge(folder))
    if judge is not None:
        scores = judge.score_texts(["a film that is good", "", "unknown words only"])
        assert scores.shape == (3,) and torch.isfinite(scores).all()


@FUZZ
@given(data=st.data())
def test_arbitrary_features_json(folder: Path, data: st.DataObject) -> None:
    content: dict[str, Any] = json.loads((folder / FEATURES).read_text(encoding="utf-8"))
    vocabulary = data.draw(st.sampled_from(content["vocabularies"]))
    match data.draw(st.integers(0, 5)):
        case 0:
            vocabulary[data.draw(st.sampled_from(sorted(vocabulary)) | st.text(max_size=5))] = data.draw(JSON)
        case 1:
            vocabulary["terms"][data.draw(st.sampled_from(sorted(vocabulary["terms"])))] = data.draw(JSON)
        case 2:
            del vocabulary[data.draw(st.sampled_from(sorted(vocabulary)))]
        case 3:
            content[data.draw(st.just("vocabularies") | st.text(max_size=5))] = data.draw(JSON)
        case 4:
            content["vocabularies"] = data.draw(st.lists(st.sampled_from(content["vocabularies"]) | JSON, max_size=3))
        case _:
            content = data.draw(JSON)
    good = (folder / FEATURES).read_bytes()
    (folder / FEATURES).write_text(json.dumps(content), encoding="utf-8")
    check(folder)
    (folder / FEATURES).write_bytes(good)


@FUZZ
@given(data=st.data())
def test_corrupted_weights(folder: Path, data: st.DataObject) -> None:
    good = (folder / WEIGHTS).read_bytes()
    broken = bytearray(good)
    for position in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        broken[position] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(
        broken[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else broken
    )
    check(folder)
    (folder / WEIGHTS).write_bytes(good)


def header(content: Any, *, length: int | None = None, rest: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


INVALID_HEADERS = {
    "header length of 2^63 bytes": header({}, length=2**63),
    "header longer than the file": header({}, length=10_000),
    "tensor beyond the end of the file": header({"idf": {"dtype": "F64", "shape": [10**12], "data_offsets": [0, 8 * 10**12]}}),
    "descending offsets": header({"idf": {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]}}, rest=b"\0" * 8),
    "two overlapping tensors": header(
        {name: {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]} for name in ("idf", "coefficients")}, rest=b"\0" * 8
    ),
    "shape whose product overflows": header({"idf": {"dtype": "F64", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, rest=b"\0" * 8),
    "deeply nested header": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "empty file": b"",
}  # fmt: skip


@pytest.mark.parametrize("content", INVALID_HEADERS.values(), ids=INVALID_HEADERS.keys())
def test_invalid_safetensors_header_is_rejected(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match="is not a loadable judge"):
        load_linear_judge(folder)
    check(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("name", ["idf_words", "idf_characters", "coefficients", "intercept"])
@pytest.mark.parametrize("folder", ["both"], indirect=True)
def test_non_finite_weights_are_rejected(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / WEIGHTS)
    weights[name][-1] = value
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(InputError, match="a weight is not finite"):
        load_linear_judge(folder)


@pytest.mark.parametrize("name", ["idf_words", "idf_characters", "coefficients", "intercept"])
@pytest.mark.parametrize("folder", ["both"], indirect=True)
def test_weights_of_another_shape_are_rejected(folder: Path, name: str) -> None:
    good = load_file(folder / WEIGHTS)
    without = {key: values for key, values in good.items() if key != name}
    for weights in (
        without,
        without | {name: good[name][1:]},
        without | {name: np.append(good[name], 1.0)},
        without | {name: good[name][None]},
        good | {"another": good[name]},
    ):
        save_file(weights, folder / WEIGHTS)
        with pytest.raises(InputError, match="one number per n-gram"):
            load_linear_judge(folder)
    save_file(good, folder / WEIGHTS)
    check(folder)
    assert load_linear_judge(folder).intercept == good["intercept"][0]


WORDS = {"analyzer": "words", "max_ngram": 1, "terms": {"good": 0}}
INVALID_FEATURES: dict[str, tuple[Any, str]] = {
    "no vocabulary": ([], "at least 1 item"),
    "one analyzer twice": ([WORDS, WORDS], "two vocabularies have one analyzer"),
    "three vocabularies": ([WORDS, WORDS | {"analyzer": "characters"}, WORDS], "at most 2 items"),
    "unknown analyzer": ([WORDS | {"analyzer": "pickle"}], "analyzer"),
    "no terms": ([WORDS | {"terms": {}}], "at least 1 item"),
    "an index is missing": ([WORDS | {"terms": {"good": 0, "bad": 2}}], "not 0 to its size - 1"),
    "an index occurs twice": ([WORDS | {"terms": {"good": 0, "bad": 0}}], "not 0 to its size - 1"),
    "a negative index": ([WORDS | {"terms": {"good": 0, "bad": -1}}], "not 0 to its size - 1"),
    "n-grams of length 0": ([WORDS | {"max_ngram": 0}], "max_ngram"),
    "n-grams of any length": ([WORDS | {"max_ngram": 10**9}], "max_ngram"),
    "an unknown key": ([WORDS | {"tokenizer": "os.system"}], "tokenizer"),
}


@pytest.mark.parametrize(("vocabularies", "reason"), INVALID_FEATURES.values(), ids=INVALID_FEATURES.keys())
@pytest.mark.parametrize("folder", ["words"], indirect=True)
def test_invalid_vocabularies_are_rejected(folder: Path, vocabularies: Any, reason: str) -> None:
    (folder / FEATURES).write_text(json.dumps({"vocabularies": vocabularies}), encoding="utf-8")
    with pytest.raises(InputError, match=f"is not a loadable judge.*{reason}"):
        load_linear_judge(folder)
