"""Reading golden cases, and comparing a result with one."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VECTORS = Path(__file__).parent / "vectors"

# How each case's `source` text begins -> the label that the compositions know it by.
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
    """A case asks for a variant that no composition here computes."""


class Params(dict[str, Any]):
    """Parameters that remember which of them were read: one that nobody read is a variant nobody computed."""

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
        """These have no bearing on the numbers."""
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
    """The cases by test id: family/name; a second folder may be named by the environment."""
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
    """Every expected number is within the case's own tolerance, and every parameter was used."""
    missing = case.expected.keys() - results.keys()
    if missing:
        raise UnknownVariant(f"nothing computes {sorted(missing)} for {case.source}")
    if case.params.unread:
        raise UnknownVariant(f"nothing reads the parameters {sorted(case.params.unread)} for {case.source}")
    for key, expected in case.expected.items():
        keep = case.mask() if key in case.masked_outputs else None
        if isinstance(results[key], list):  # rows of different lengths
            for row, (got_row, expected_row) in enumerate(zip(results[key], expected, strict=True)):
                compare(f"{key}[{row}]", got_row, expected_row, case)
        else:
            compare(key, results[key], expected, case, keep)


def compare(key: str, got: Any, expected: Any, case: Case, keep: Tensor | None = None) -> None:
    """|got - expected| <= atol + rtol * |expected|, where keep is True."""
    got = torch.as_tensor(got, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape, f"{key}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    # A nan in either is outside every tolerance, because no comparison with nan is true.
    inside = (got == expected) | ((got - expected).abs() <= case.atol + case.rtol * expected.abs())
    if keep is not None:
        inside = inside | ~keep
    report = f"{key}\n     got {got.tolist()}\nexpected {expected.tolist()}\n  inside {inside.tolist()}"
    assert bool(inside.all()), report
