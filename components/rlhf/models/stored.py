"""The form that weights have in a model folder: other names, experts of their own instead of one fused tensor, fused matrices."""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)


def stored_weights(directory: Path, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder with these names, one at a time, as they are stored."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in names:
                    yield name, file.get_tensor(name)


class StoredForm:
    """Turns the weights of a model into those of its folder one after another; transformers does it for a whole model at once.

    Weights that become one (such as q, k and v in some architectures) are kept until all of them are there.
    names are those of every weight that the folder will have.
    """

    def __init__(self, lm: Any, names: Iterable[str]) -> None:
        self.lm = lm
        transforms = [transform.reverse_transform() for transform in reversed(_conversions(lm))]
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._key: dict[str, str] = {}  # of the group of weights that are converted together
        self._groups: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)  # its weights, with their patterns
        self._converters: dict[str, WeightConverter] = {}
        # In transformers' order, because some renamings apply only after others.
        for name in sorted(names, key=dot_natural_key):
            key, pattern = apply_converters(name, converters)
            if pattern is None:
                key = apply_renamings(name, self._renamings)
            elif key not in self._converters:
                self._converters[key] = copy.deepcopy(next(c for c in converters if pattern in c.source_patterns))
            self._key[name] = key
            self._groups[key].append((name, pattern or name))

    def convert(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights under their stored names. Raises ValueError if one that belongs to others is missing at the end."""
        waiting: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, weight in named:
            key = self._key[name]
            if key not in self._converters:
                yield key, weight
                del weight  # an engine gathers the next weight before the loop assigns it
                continue
            found, group = waiting[key], self._groups[key]
            # An engine that gathers one weight at a time frees it afterwards.
            found[name] = weight if len(group) == 1 else weight.clone()
            del weight
            if len(found) == len(group):
                yield from self._convert(key, waiting.pop(key))
        if waiting:
            raise ValueError(f"weights are missing to make {', '.join(sorted(waiting)[:3])}")

    def _convert(self, key: str, found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        converter = self._converters[key]
        for name, pattern in self._groups[key]:
            converter.add_tensor(key, name, pattern, found.pop(name))  # type: ignore[arg-type]
        converted = converter.convert(key, model=self.lm, config=self.lm.config)
        for name in list(converted):
            value = converted.pop(name)
            yield apply_renamings(name, self._renamings), value[0] if isinstance(value, list) else value


def _conversions(lm: Any) -> list[Any]:
    """How the weights were converted when lm was loaded, or what its architecture's folders need."""
    used = getattr(lm, "_weight_conversions", None)
    if used is not None:
        return list(used)
    # A prefix is removed only if it was there in the folder, which is not known.
    return [c for c in get_model_conversion_mapping(lm, add_legacy=False) if not isinstance(c, PrefixChange)]
