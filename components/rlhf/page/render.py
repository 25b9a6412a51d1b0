"""Renders the templates of pages, and fills in what was not known when a page was written."""

import re
from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).parent


def render(template: Path, **values: Any) -> str:
    """A page from a template, which extends base.html. Every value is escaped; Markup, such as a chart, is not."""
    loader = jinja2.FileSystemLoader([template.parent, FOLDER])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template.name).render(**values)


def replace_part(page: str, name: str, part: str) -> str:
    """The page with another content between <!-- NAME --> and <!-- /NAME -->, which texts in a page cannot contain, being escaped.

    A page without such a part is returned as it is.
    """
    return re.sub(
        f"(<!-- {name} -->).*?(<!-- /{name} -->)", lambda match: f"{match[1]}{part}{match[2]}", page, flags=re.DOTALL
    )
