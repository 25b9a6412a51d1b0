"""YAML that means one thing and has a size that people write: what is doubled, endless or unreadable is refused.

PyYAML lets the last of two equal keys win, follows aliases into billions of values, and raises four kinds of errors.
"""

import unicodedata
from collections.abc import Hashable
from typing import Any

import yaml

MAX_BYTES = 2**20
MAX_VALUES = 50_000  # when every alias is written out
MERGE = "tag:yaml.org,2002:merge"


class NotYamlError(ValueError):
    """Why a text is not YAML that can be read, as part of a sentence; line counts from 1, 0 is none."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises NotYamlError, and nothing else, for whatever else it is."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, {}, ()) > MAX_VALUES:
            raise NotYamlError(f"its aliases come to more than {MAX_VALUES:,} values")
        value = loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise NotYamlError(_readable(problem), mark.line + 1 if mark else 0) from None
    except RecursionError:
        raise NotYamlError("nested too deep") from None
    except NotYamlError:
        raise
    except (ValueError, OverflowError) as error:  # a date or a number that is none, or one with thousands of digits
        raise NotYamlError(_readable(str(error))) from None
    finally:
        if loader is not None:
            loader.dispose()
    return value


def _size(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node comes to. Raises NotYamlError for a key that stands twice, a cycle, and text that cannot be shown."""
    if id(node) in above:
        raise NotYamlError("an alias holds itself", node.start_mark.line + 1)
    if id(node) not in sizes:
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.ScalarNode):
            _require_printable(node)
            inner = []
        elif isinstance(node, yaml.MappingNode):
            _require_different_keys(node)
        sizes[id(node)] = 1 + sum(_size(part, sizes, (*above, id(node))) for part in inner)
    return sizes[id(node)]


def _require_different_keys(node: yaml.MappingNode) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if (key.tag, key.value) in seen:
                raise NotYamlError(f"the key {key.value[:80]!a} stands there twice", key.start_mark.line + 1)
            seen.add((key.tag, key.value))


def _require_printable(node: yaml.ScalarNode) -> None:
    """Paths and names hold no control characters, line breaks or halves of a surrogate pair; what quotes them could not be read."""
    strange = next((c for c in node.value if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)
    if strange is not None:
        raise NotYamlError(f"there is the character {strange!a} in a text", node.start_mark.line + 1)


def _readable(text: str) -> str:
    text = " ".join(text.split())[:200]
    return text if text.isprintable() else ascii(text)[1:-1]
