"""A strict YAML parser: duplicate keys, cyclic or huge expansions of aliases, and unprintable characters are errors.

PyYAML keeps the last of duplicate keys, expands aliases into billions of values, and raises four types of errors.
"""

import unicodedata
from collections.abc import Hashable
from typing import Any

import yaml

MAX_BYTES = 2**20
MAX_VALUES = 50_000  # with all aliases expanded
MERGE = "tag:yaml.org,2002:merge"


class NotYamlError(ValueError):
    """The text is not strict YAML; the message is the reason, as part of a sentence. line counts from 1; 0 is unknown."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


def parse_yaml(text: str) -> Any:
    """Parse YAML text. Raises only NotYamlError."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _expanded_size(root, {}, ()) > MAX_VALUES:
            raise NotYamlError(f"its aliases expand to more than {MAX_VALUES:,} values")
        value = loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise NotYamlError(_one_line(problem), mark.line + 1 if mark else 0) from None
    except RecursionError:
        raise NotYamlError("it is nested too deeply") from None
    except NotYamlError:
        raise
    except (ValueError, OverflowError) as error:  # an invalid date or number, or one with thousands of digits
        raise NotYamlError(_one_line(str(error))) from None
    finally:
        if loader is not None:
            loader.dispose()
    return value


def _expanded_size(node: yaml.Node, sizes: dict[int, int], ancestors: tuple[int, ...]) -> int:
    """Number of values with aliases expanded. Raises NotYamlError for duplicate keys, cycles and unprintable text."""
    if id(node) in ancestors:
        raise NotYamlError("an alias contains itself", node.start_mark.line + 1)
    if id(node) not in sizes:
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.ScalarNode):
            _require_printable(node)
            children = []
        elif isinstance(node, yaml.MappingNode):
            _require_unique_keys(node)
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes, (*ancestors, id(node))) for child in children)
    return sizes[id(node)]


def _require_unique_keys(node: yaml.MappingNode) -> None:
    seen: set[Hashable] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if (key.tag, key.value) in seen:
                raise NotYamlError(f"the key {key.value[:80]!a} is duplicated", key.start_mark.line + 1)
            seen.add((key.tag, key.value))


def _require_printable(node: yaml.ScalarNode) -> None:
    """Reject control characters other than newlines and tabs, and lone surrogates, which would garble messages that quote the value."""
    unprintable = next((c for c in node.value if unprintable_character(c) and c not in "\n\t"), None)
    if unprintable is not None:
        raise NotYamlError(f"a value contains the character {unprintable!a}", node.start_mark.line + 1)


def unprintable_character(character: str) -> bool:
    """Whether a character breaks a line, controls a terminal, or is half of a pair of surrogates."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _one_line(text: str) -> str:
    text = " ".join(text.split())[:200]
    return text if text.isprintable() else ascii(text)[1:-1]
