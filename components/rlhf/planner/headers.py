"""Names, shapes and dtypes of the tensors in model files, read from their headers alone."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

from components.rlhf.text.errors import InputError

MAX_HEADER_BYTES = 100 * 2**20  # the limit of safetensors itself
BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
}
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
MAX_GGUF_ENTRIES = 10**6


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """The header of a tensor. num_bytes is 0 if the file does not say it."""

    shape: tuple[int, ...]
    num_bytes: int

    @property
    def size(self) -> int:
        return prod(self.shape)


Tensors = Mapping[str, Tensor]


def read_safetensors(read: Callable[[int, int], bytes], name: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file; read(start, length) returns a range of its bytes. Raises InputError."""
    try:
        (length,) = struct.unpack("<Q", read(0, 8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length:,} bytes")
        header = json.loads(read(8, length))
        header.pop("__metadata__", None)
        return {key: _tensor(entry) for key, entry in header.items()}
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{name} is not a safetensors file ({str(error)[:200]}); save the model again.") from None


def _tensor(entry: Mapping[str, object]) -> Tensor:
    shape, dtype = entry["shape"], entry["dtype"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"the shape {str(shape)[:80]}")
    return Tensor(shape=tuple(shape), num_bytes=prod(shape) * BYTES.get(str(dtype), 0))


def read_gguf(file: BinaryIO, name: str) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Metadata and tensors of a GGUF file, whose shapes are stored with the last dimension first. Raises InputError."""
    try:
        if file.read(4) != b"GGUF":
            raise ValueError("no GGUF signature")
        version, num_tensors, num_entries = struct.unpack("<IQQ", file.read(20))
        if version < 2 or max(num_tensors, num_entries) > MAX_GGUF_ENTRIES:
            raise ValueError(f"version {version}, {num_tensors} tensors")
        metadata = {}
        for _ in range(num_entries):
            key = _string(file)
            metadata[key] = _value(file, *struct.unpack("<I", file.read(4)))
        tensors = {}
        for _ in range(num_tensors):
            key = _string(file)
            (rank,) = struct.unpack("<I", file.read(4))
            shape = struct.unpack(f"<{min(rank, 8)}Q", file.read(8 * min(rank, 8)))
            file.read(12)  # type and offset
            tensors[key] = Tensor(shape=tuple(reversed(shape)), num_bytes=0)
        return metadata, tensors
    except (struct.error, ValueError, KeyError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not a GGUF file ({str(error)[:200]}); choose another package.") from None


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 2**26:
        raise ValueError(f"a string of {length:,} bytes")
    return file.read(length).decode()


def _value(file: BinaryIO, kind: int) -> object:
    if kind == GGUF_STRING:
        return _string(file)
    if kind != GGUF_ARRAY:
        code = GGUF_SCALARS[kind]
        (value,) = struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))
        return value
    inner, length = struct.unpack("<IQ", file.read(12))
    if length > MAX_GGUF_ENTRIES:
        raise ValueError(f"an array of {length:,} values")
    for _ in range(length):  # the vocabulary, which is only counted
        _value(file, inner)
    return length
