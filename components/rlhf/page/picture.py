"""Charts as one picture, for places that show a file and no page."""

from collections.abc import Sequence

from markupsafe import Markup

from components.rlhf.page.charts import HEIGHT, WIDTH
from components.rlhf.page.render import FOLDER

COLUMNS, TITLE, GAP = 3, 40.0, 24.0  # of the grid; height of a title with its legend, and the space around a chart


def picture(panels: Sequence[tuple[str, Markup, Sequence[tuple[str, str]]]]) -> str:
    """Charts with their titles and legends (name and color of each line) as an SVG that stands alone; "" without any.

    It has the style of the pages, and follows the color scheme.
    """
    if not panels:
        return ""
    columns = min(COLUMNS, len(panels))
    cell_width, cell_height = WIDTH + GAP, HEIGHT + TITLE + GAP
    width, height = columns * cell_width + GAP, -(-len(panels) // columns) * cell_height + GAP
    parts = [Markup('<rect width="100%" height="100%" style="fill: var(--card)"/>')]
    for number, (title, chart, legend) in enumerate(panels):
        x, y = GAP + number % columns * cell_width, GAP + number // columns * cell_height
        names = Markup("").join(
            Markup('<tspan dx="{}" style="fill: var(--tone)" class="s-{}">\u25cf {}</tspan>').format(
                0 if first else 12, tone, name
            )
            for first, (name, tone) in ((i == 0, each) for i, each in enumerate(legend if len(legend) > 1 else ()))
        )
        head = Markup('<text class="title" x="0" y="12">{}</text><text x="0" y="30">{}</text>').format(title, names)
        # The class of the chart is that of the group, because its width is that of the page.
        inner = f'<svg y="{TITLE:.0f}" width="{WIDTH:.0f}" height="{HEIGHT:.0f}" '
        placed = Markup(str(chart).replace('<svg class="chart" ', inner, 1))
        parts.append(
            Markup(f'<g class="chart" transform="translate({x:.0f} {y:.0f})">') + head + placed + Markup("</g>")
        )
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    style += ".chart { overflow: visible } .chart text.title { font-size: 14px; font-weight: 600; fill: var(--ink) }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">'
        f"<style>{style}</style>{Markup('').join(parts)}</svg>"
    )
