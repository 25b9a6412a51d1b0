"""Reads golden cases, and compares results with them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VECTORS = Path(__file__).parent / "vectors"

# Prefix of a case's `source` -> label used by the compositions.
ORIGINS = {
    "OpenRLHF v0.5.5": "openrlhf_v0.5.5",
    "OpenRLHF v0.8.0": "openrlhf_v0.8.0",
    "OpenRLHF HEAD": "openrlhf_head",
    "verl ": "verl",
    "TRL v0.11.4": "trl_v0.11.4",
    "TRL ": "trl",
    "summarize_from_feedback_details": "nplus",
    "lm-human-preference-details": "lmhp_details",
    "openai/lm-human-preferences": "openai",
}


class UnknownVariant(Exception):
    """A case needs a variant that is not implemented here."""


class Params(dict[str, Any]):
    """Parameters that record which were read: an unread one means that its variant was not computed."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.unread = set(values)

    def __getitem__(self, key: str) -> Any:
        self.unread.discard(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.unread.discard(key)
        return super().get(key, default)

    def ignore(self, *keys: str) -> None:
        """Mark parameters that do not affect the numbers."""
        self.unread.difference_update(keys)


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    source: str
    inputs: dict[str, Any]
    params: Params
    expected: dict[str, Any]
    masked_outputs: list[str]
    atol: float
    rtol: float

    @property
    def origin(self) -> str:
        for beginning, label in ORIGINS.items():
            if self.source.startswith(beginning):
                return label
        raise UnknownVariant(f"unknown source: {self.source}")

    def floats(self, name: str) -> Tensor:
        return torch.tensor(self.inputs[name], dtype=torch.float64)

    def ints(self, name: str) -> Tensor:
        return torch.tensor(self.inputs[name], dtype=torch.int64)

    def mask(self, name: str = "mask") -> Tensor:
        return self.ints(name).bool()


def read_folder(folder: Path) -> Iterator[Case]:
    """Every case of every JSON file in the folder."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no *.json in {folder}")
    for file in files:
        document = json.loads(file.read_text())
        if document["schema"] != 1:
            raise ValueError(f"{file}: schema {document['schema']}, expected 1")
        for case in document["cases"]:
            yield Case(
                family=document["family"],
                name=case["name"],
                source=case["source"],
                inputs=case["inputs"],
                params=Params(case["params"]),
                expected=case["expected"],
                masked_outputs=case["masked_outputs"],
                atol=case["atol"],
                rtol=case["rtol"],
            )


def all_cases() -> dict[str, Case]:
    """All cases by test id, family/name; RLHF_GOLDEN_DIR may name a second folder."""
    folders = [VECTORS]
    if os.environ.get("RLHF_GOLDEN_DIR"):
        folders.append(Path(os.environ["RLHF_GOLDEN_DIR"]))
    cases: dict[str, Case] = {}
    for folder in folders:
        for case in read_folder(folder):
            case_id = f"{case.family}/{case.name}"
            while case_id in cases:
                case_id += "@" + folder.name
            cases[case_id] = case
    return cases


def check(case: Case, results: dict[str, Any]) -> None:
    """Assert that every expected number is within the case's tolerance, and that every parameter was read."""
    missing = case.expected.keys() - results.keys()
    if missing:
        raise UnknownVariant(f"{sorted(missing)} are not computed for {case.source}")
    if case.params.unread:
        raise UnknownVariant(f"the parameters {sorted(case.params.unread)} are not read for {case.source}")
    for key, expected in case.expected.items():
        mask = case.mask() if key in case.masked_outputs else None
        if isinstance(results[key], list):  # rows of different lengths
            for row, (got_row, expected_row) in enumerate(zip(results[key], expected, strict=True)):
                compare(f"{key}[{row}]", got_row, expected_row, case)
        else:
            compare(key, results[key], expected, case, mask)


def compare(key: str, got: Any, expected: Any, case: Case, mask: Tensor | None = None) -> None:
    """Assert |got - expected| <= atol + rtol * |expected| where mask is True."""
    got = torch.as_tensor(got, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape, f"{key}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    # A nan always fails, because comparisons with nan are false.
    close = (got == expected) | ((got - expected).abs() <= case.atol + case.rtol * expected.abs())
    if mask is not None:
        close = close | ~mask
    report = f"{key}\n     got {got.tolist()}\nexpected {expected.tolist()}\n   close {close.tolist()}"
    assert bool(close.all()), report
