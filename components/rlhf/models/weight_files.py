"""Writes weights into safetensors files one after another, so that one tensor at a time is in memory.

The files are those that safetensors and transformers would write: https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

MAX_FILE = 4 * 2**30  # bytes of one file; a larger tensor has a file of its own
INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one tensor is written."""

    file: str
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFiles:
    """The files of a model's weights in a folder. `empty` are the weights without data (on the device meta), by name."""

    def __init__(self, folder: Path, empty: Iterable[tuple[str, Tensor]], *, max_file: int = MAX_FILE) -> None:
        self.folder = folder
        groups = list(_split(list(empty), max_file))
        names = ["model.safetensors"]
        if len(groups) > 1:
            names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        self.slots: dict[str, Slot] = {}
        self.headers: dict[str, bytes] = {}
        for file, group in zip(names, groups, strict=False):
            self._lay_out(file, group)
        self.sizes = {"total_parameters": 0, "total_size": 0}
        for _, tensor in (pair for group in groups for pair in group):
            self.sizes["total_parameters"] += tensor.numel()
            self.sizes["total_size"] += tensor.nbytes

    def write(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Write all weights, in any order. After an error no file is left. Raises ValueError if they are not the expected ones."""
        missing = set(self.slots)
        files: dict[str, BinaryIO] = {}
        try:
            for name, header in self.headers.items():
                files[name] = (self.folder / name).open("wb")
                files[name].write(header)
            for name, tensor in named:
                self._write(files, name, tensor)
                missing.remove(name)
                del tensor  # before the next one is made
            if missing:
                raise ValueError(f"no value for {', '.join(sorted(missing)[:3])}")
        except BaseException:
            for name in self.headers:
                (self.folder / name).unlink(missing_ok=True)
            raise
        finally:
            for file in files.values():
                file.close()
        if len(self.headers) > 1:
            index = {"metadata": self.sizes, "weight_map": {name: slot.file for name, slot in self.slots.items()}}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")

    def _write(self, files: dict[str, BinaryIO], name: str, tensor: Tensor) -> None:
        slot = self.slots[name]
        if (tuple(tensor.shape), tensor.dtype) != (slot.shape, slot.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {slot.dtype} {slot.shape}")
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        files[slot.file].seek(slot.offset)
        files[slot.file].write(data.numpy().data)

    def _lay_out(self, file: str, group: list[tuple[str, Tensor]]) -> None:
        """Give each tensor of a file its place. Wide types come first, so that every tensor is aligned."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position, places = 0, []
        for name, tensor in sorted(group, key=lambda pair: (-pair[1].itemsize, pair[0])):
            end = position + tensor.nbytes
            dtype = DTYPE_NAMES[tensor.dtype]
            entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
            places.append((name, tensor, position))
            position = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.headers[file] = len(text).to_bytes(8, "little") + text
        for name, tensor, start in places:
            offset = len(self.headers[file]) + start
            self.slots[name] = Slot(file=file, offset=offset, shape=tuple(tensor.shape), dtype=tensor.dtype)


def _split(named: list[tuple[str, Tensor]], max_file: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive weights of at most max_file bytes, or a single one."""
    group: list[tuple[str, Tensor]] = []
    for name, tensor in named:
        if group and sum(other.nbytes for _, other in group) + tensor.nbytes > max_file:
            yield group
            group = []
        group.append((name, tensor))
    yield group
