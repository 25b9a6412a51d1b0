"""Malicious data files: they give rows or a one-line error, in bounded memory."""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import components.rlhf.data.files as files
from components.rlhf.config.prepare_data import FIELDS, DataSource
from components.rlhf.data.chat import DEFAULT_DATE
from components.rlhf.data.examples import Unusable
from components.rlhf.data.fields import NAMES, Fields
from components.rlhf.data.preferences import TWO_ANSWERS
from components.rlhf.data.render import Renderer
from components.rlhf.data.shapes import CONVERTERS
from components.rlhf.data.sources import read_rows
from tests.rlhf.data.test_shapes import row_in, table
from tests.support.chat_tokenizers import FAMILIES, make_tokenizer
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
    for found in read(path) or []:
        assert found.location.startswith(f"{path}:") and isinstance(found.row, dict)


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


@FUZZ
@given(data=st.data(), name=st.sampled_from(["data.json", "data.csv", "data.jsonl.gz", "data.json.gz"]))
def test_arbitrary_bytes_in_arrays_tables_and_archives(tmp_path: Path, data: st.DataObject, name: str) -> None:
    content = json.dumps(ROWS[:3]).encode() if ".json" in name else b'prompt,n\n"a, b",1\nc,2\n'
    path = tmp_path / name
    path.write_bytes(mutate(data, gzip.compress(content) if name.endswith(".gz") else content))
    for row in (found.row for found in read(path) or []):
        assert isinstance(row, dict)


SMALL_ROWS = st.lists(
    st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers(-9, 9), max_size=3), max_size=4
)


@FUZZ
@given(rows=SMALL_ROWS, chunk=st.integers(1, 40))
def test_any_array_is_read_whatever_its_chunks(tmp_path: Path, rows: list[dict[str, object]], chunk: int) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        assert [found.row for found in read_rows(DataSource(path=str(path)))] == rows


KEYS = ["role", "content", "from", "value", "type", "text", "tool_calls", "function", "name", "arguments"]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
COLUMNS = sorted(
    {name for names in NAMES.values() for name in names}
    | {name for first, second, better in TWO_ANSWERS for name in (first, second, *better)}
    | {*FIELDS, "info", "summaries", "choice", "text"}
)


DOCUMENTED = [(section, row_in(row)) for _, section, row, _ in table("shapes")]
RENDERERS = [
    Renderer(tokenizer=make_tokenizer(family), is_chat=is_chat, date=DEFAULT_DATE)
    for family in FAMILIES
    for is_chat in (True, False)
    if family != "no template" or not is_chat
]


@FUZZ
@given(
    documented=st.sampled_from(DOCUMENTED),
    changes=st.dictionaries(st.sampled_from(COLUMNS), JSON_VALUES, max_size=3),
    renderer=st.sampled_from(RENDERERS),
    section=st.sampled_from(sorted(CONVERTERS)) | st.none(),
)
def test_any_row_is_rendered_or_unusable(
    documented: tuple[str, dict[str, object]], changes: dict[str, object], renderer: Renderer, section: str | None
) -> None:
    """Whatever is put into some columns of a row in a documented shape, for any chat template."""
    own, row = documented
    section = section or own
    try:
        for example in CONVERTERS[section](Fields(row | changes)):
            if isinstance(example, Unusable):
                continue
            if section == "prompts":
                records: list[Any] = [renderer.prompt(example)]
            elif section == "demonstrations":
                records = list(renderer.demonstrations(example))
            else:
                records = [renderer.rated(example) if len(example.answers) == 1 else renderer.pair(example)]
            assert records and all(record.prompt for record in records)
    except Unusable:
        return
