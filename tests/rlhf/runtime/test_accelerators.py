from pathlib import Path

import pytest
import torch

from components.rlhf.runtime import accelerators
from components.rlhf.runtime.accelerators import NUM_ACCELERATORS, driver_version, require_accelerators
from components.rlhf.text.errors import InputError

# First lines of /proc/driver/nvidia/version, of the proprietary and of the open kernel module.
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\nGCC version:  gcc 12.3.0\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\nGCC version: gcc\n"


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def set_up(*, wanted: int, found: int = 0, cuda: str | None = "13.0", driver: str | None = None) -> None:
        monkeypatch.setenv(NUM_ACCELERATORS, str(wanted))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
        monkeypatch.setattr(accelerators, "DRIVER_VERSION", tmp_path / "version")
        if driver:
            (tmp_path / "version").write_text(driver)

    return set_up


@pytest.mark.parametrize(("text", "expected"), [(CLOSED, "535.54.03"), (OPEN, "580.65.06"), ("other", None)])
def test_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, expected: str | None) -> None:
    monkeypatch.setattr(accelerators, "DRIVER_VERSION", tmp_path / "version")
    assert driver_version() is None
    (tmp_path / "version").write_text(text)
    assert driver_version() == expected


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"wanted": 8, "driver": CLOSED},
            "finds 0: CUDA 13.0 needs the driver R580 or newer, and the node has 535.54.03",
        ),
        ({"wanted": 1, "driver": CLOSED, "cuda": "12.8"}, "the driver of the node is 535.54.03; look at nvidia-smi"),
        ({"wanted": 1}, "the container sees no NVIDIA driver"),
        ({"wanted": 1, "cuda": None, "driver": OPEN}, "the image has a torch without CUDA"),
        ({"wanted": 8, "found": 4, "driver": OPEN}, "The task has 8 accelerators, but torch"),
    ],
)
def test_missing_accelerators_are_refused(node, settings: dict, reason: str) -> None:
    node(**settings)
    with pytest.raises(InputError) as caught:
        require_accelerators()
    assert reason in str(caught.value) and str(caught.value).count("\n") == 0


@pytest.mark.parametrize("settings", [{"wanted": 0}, {"wanted": 2, "found": 2}, {"wanted": 2, "found": 8}])
def test_enough_accelerators_are_accepted(node, settings: dict) -> None:
    node(**settings)
    require_accelerators()


def test_stage_elsewhere_uses_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NUM_ACCELERATORS, raising=False)
    require_accelerators()
