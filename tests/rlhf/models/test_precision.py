from pathlib import Path

import pytest
import torch

from components.rlhf.models import precision
from components.rlhf.models.precision import autocast_to, compute_dtype


def test_explicit_precision() -> None:
    assert compute_dtype("fp32") == torch.float32
    assert compute_dtype("bf16") == torch.bfloat16


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_depends_on_the_hardware(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "_has_bf16", lambda: has_bf16)
    assert compute_dtype("auto") == expected


@pytest.mark.parametrize(("flags", "expected"), [("fpu amx_bf16 sse", True), ("fpu avx512_bf16", True), ("fpu", False)])
def test_bf16_support_is_read_from_cpu_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "Path", lambda _path: tmp_path / "cpuinfo")
    assert precision._has_bf16() is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_products_in_dtype(dtype: torch.dtype) -> None:
    with autocast_to(dtype, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
