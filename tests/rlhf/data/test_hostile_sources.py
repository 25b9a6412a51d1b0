"""Malicious data files: they give rows or a one-line error, in bounded memory."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.rlhf.config.prepare_data import DataSource
from components.rlhf.data.sources import read_rows
from tests.support.hostile_input import result_or_refusal

FUZZ = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [{"prompt": f"a film {n}", "chosen": " good é", "rejected": [" bad"], "n": n / 3} for n in range(20)]
MEMORY = """
import resource, sys
from components.rlhf.config.prepare_data import DataSource
from components.rlhf.data.sources import read_rows
from components.rlhf.text.errors import InputError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(len(list(read_rows(DataSource(path=sys.argv[1])))))
except InputError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def read(path: Path) -> list[object] | None:
    return result_or_refusal(lambda: list(read_rows(DataSource(path=str(path)))))


def mutate(data: st.DataObject, good: bytes) -> bytes:
    """Change, remove or insert bytes at random positions."""
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        stop = min(len(content), start + data.draw(st.integers(0, 8)))
        content[start:stop] = data.draw(st.binary(max_size=8))
    return bytes(content)


@FUZZ
@given(data=st.data())
def test_arbitrary_bytes_in_jsonl(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(mutate(data, "".join(json.dumps(row) + "\n" for row in ROWS[:3]).encode()))
    for location, row in read(path) or []:
        assert location.startswith(f"{path}:") and isinstance(row, dict)


@FUZZ
@given(data=st.data())
def test_arbitrary_bytes_in_parquet(tmp_path: Path, data: st.DataObject) -> None:
    path, good = tmp_path / "data.parquet", tmp_path / "good.parquet"
    if not good.exists():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), good)
    path.write_bytes(mutate(data, good.read_bytes()))
    read(path)


@pytest.mark.parametrize("content", [b"\0", b"{", b'{"prompt": "'])
def test_10_gb_line_is_rejected_in_bounded_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    os.truncate(path, 10 * 10**9)  # sparse, takes no disk space
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, timeout=60)
    message, memory = done.stdout.splitlines()
    assert message == f"{path}:1 is longer than 16 MiB; each line must be one record."
    assert int(memory) < 100e6


def test_zip_bomb_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.jsonl", b"0" * 10**8)
    assert read(path) is None
