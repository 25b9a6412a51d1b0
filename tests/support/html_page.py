"""A parsed HTML page: its text, headings, ids and references, and what is wrong with its structure."""

import itertools
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "input", "br", "hr", "img", "link", "source", "wbr"}
HEADINGS = {f"h{level}" for level in range(1, 7)}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text that is shown, with single spaces."""
        return " ".join("".join(self._texts()).split())

    def _texts(self) -> list[str]:
        if self.tag in ("style", "script"):
            return []
        found = []
        for child in self.children:
            found += [child] if isinstance(child, str) else child._texts()
        return [*found, " "]

    def all(self, tag: str = "", **attributes: str) -> list["Element"]:
        """All elements below this one with this tag and these attributes; class_ is one of the classes."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if child.matches(tag, attributes) else []
                found += child.all(tag, **attributes)
        return found

    def matches(self, tag: str, attributes: dict[str, str]) -> bool:
        classes = self.attributes.get("class", "").split()
        return (not tag or self.tag == tag) and all(
            value in classes if name == "class_" else self.attributes.get(name) == value
            for name, value in attributes.items()
        )


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Element:
    """Fails if a tag is not closed, or closed in the wrong place."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"not closed: {[element.tag for element in parser.open[1:]]}"
    return parser.root


def check_structure(page: Element) -> None:
    """Fails unless ids are unique, references within the page lead somewhere, and headings are in order, with one h1."""
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(set(ids)) == len(ids), "an id is given twice"
    for element in page.all():
        for name in ("href", "aria-labelledby", "aria-describedby", "for"):
            target = element.attributes.get(name, "").removeprefix("#")
            assert not target or target in ids, f"{name}={target} leads nowhere"
    levels = [int(element.tag[1]) for element in page.all() if element.tag in HEADINGS]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
