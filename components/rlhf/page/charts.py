"""Charts as inline SVG, of the width of a phone: a grid shows several beside each other on a wider screen.

A pointer over a chart, or a finger on it, shows its values by CSS alone. A reader of the screen hears the label; the values are to be in a
table beside the chart. Colors are those of the classes s-NAME in style.css.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

from components.rlhf.page.scale import Scale, limits, number_text, tick_texts, ticks

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 16.0, 18.0, 38.0
CHAR, LINE = 6.1, 15.0  # size of a character and a line of a tip
SHAPES = (
    "M0-3.6A3.6 3.6 0 1 1 0 3.6A3.6 3.6 0 1 1 0-3.6Z",  # circle
    "M-3.2-3.2H3.2V3.2H-3.2Z",  # square
    "M0-4.4L4.4 0L0 4.4L-4.4 0Z",  # diamond
)
MAX_MARKERS = 30  # a line with more points is drawn without markers


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: one value per x, None for a gap. tone names its color."""

    name: str
    values: Sequence[float | None]
    tone: str


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What is marked in a chart, with its labels."""

    x: Sequence[tuple[float, str]] = ()  # vertical lines
    y: Sequence[tuple[float, str]] = ()  # horizontal lines
    region: tuple[float, float, str] | None = None  # shaded from x to x


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The axes of a chart."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_label: str
    x: Scale = field(init=False)
    y: Scale = field(init=False)

    def __post_init__(self) -> None:
        x = Scale(low=self.x_ticks[0], high=self.x_ticks[-1], start=LEFT, end=WIDTH - RIGHT)
        y = Scale(low=self.y_ticks[0], high=self.y_ticks[-1], start=HEIGHT - BOTTOM, end=TOP)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)

    def draw(self) -> Markup:
        parts = []
        for value, text in zip(self.y_ticks, tick_texts(self.y_ticks), strict=True):
            at = self.y(value)
            parts.append(Markup(f'<path class="grid" d="M{LEFT:.1f} {at:.1f}H{WIDTH - RIGHT:.1f}"/>'))
            parts.append(_text(LEFT - 6, at + 4, text, anchor="end"))
        for value, text in zip(self.x_ticks, tick_texts(self.x_ticks), strict=True):
            parts.append(_text(self.x(value), HEIGHT - BOTTOM + 16, text, anchor="middle"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, self.x_label, anchor="middle", tone="label"))
        return Markup("").join(parts)


def line_chart(
    label: str,
    xs: Sequence[float],
    series: Sequence[Series],
    *,
    x_label: str,
    decimals: int = 2,
    x_decimals: int = 0,
    marks: Marks | None = None,
    include: Sequence[float] = (),
) -> Markup:
    """Lines through points in the given order. label says what the chart shows; include are values that the vertical axis contains.

    decimals are those of the values in the tips, x_decimals those of x.
    """
    marks = marks or Marks()
    shown = [value for one in series for value in one.values]
    frame = Frame(
        x_ticks=ticks(*limits(xs)),
        y_ticks=ticks(*limits(shown, include=[*include, *(value for value, _ in marks.y)])),
        x_label=x_label,
    )
    parts = [frame.draw(), _marks(marks, frame)]
    for number, one in enumerate(series):
        parts.append(_line(one, xs, frame, SHAPES[number % len(SHAPES)]))
    tips = []
    for number, x in enumerate(xs):
        values = [(one, one.values[number]) for one in series]
        lines = [f"{x_label} {number_text(x, x_decimals)}"]
        lines += [f"{one.name} {number_text(value, decimals)}" for one, value in values if value is not None]
        tips.append((frame.x(x), lines))
    return _svg(label, [*parts, *_hits(tips)])


def histogram(label: str, groups: Sequence[Series], *, x_label: str, whole: bool = False, num_bins: int = 24) -> Markup:
    """Numbers of values in bins of equal width, one outline over the other. whole: the values are whole numbers."""
    values = [value for group in groups for value in group.values if value is not None]
    edges = bin_edges(values, whole=whole, num_bins=num_bins)
    counts = [count_in_bins([v for v in group.values if v is not None], edges) for group in groups]
    frame = Frame(
        x_ticks=ticks(edges[0], edges[-1]),
        y_ticks=ticks(0, max((max(count) for count in counts), default=1) or 1),
        x_label=x_label,
    )
    parts = [frame.draw()]
    for group, count in zip(groups, counts, strict=True):
        path = f"M{frame.x(edges[0]):.1f} {frame.y(0):.1f}"
        for (start, end), number in zip(pairwise(edges), count, strict=True):
            path += f"L{frame.x(start):.1f} {frame.y(number):.1f}L{frame.x(end):.1f} {frame.y(number):.1f}"
        path += f"L{frame.x(edges[-1]):.1f} {frame.y(0):.1f}"
        parts.append(Markup(f'<path class="bars s-{group.tone}" d="{path}Z"/>'))
    step = edges[1] - edges[0]
    tips = []
    for number, (start, end) in enumerate(pairwise(edges)):
        if whole:
            first, last = int(start + 0.5), int(end - 0.5)
            name = f"{first}" if first == last else f"{first} to {last}"
        else:
            name = " to ".join(number_text(edge, 0 if step >= 5 else 2) for edge in (start, end))
        lines = [name, *(f"{group.name} {count[number]:,}" for group, count in zip(groups, counts, strict=True))]
        tips.append((frame.x((start + end) / 2), lines))
    return _svg(label, [*parts, *_hits(tips)])


def bin_edges(values: Sequence[float], *, whole: bool, num_bins: int) -> list[float]:
    """Edges of bins of equal width that contain all values; those of whole numbers lie halfway between them."""
    low, high = limits(values)
    if whole:
        low, high = (min(values), max(values)) if values else (0, 0)
        width = max(1, -(-(int(high) - int(low) + 1) // num_bins))
        number = (int(high) - int(low)) // width + 1
        return [low - 0.5 + width * i for i in range(number + 1)]
    return [low + (high - low) * i / num_bins for i in range(num_bins + 1)]


def count_in_bins(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values are in each bin; the last edge belongs to the last bin."""
    counts = [0] * (len(edges) - 1)
    width = (edges[-1] - edges[0]) / len(counts)
    for value in values:
        counts[min(int((value - edges[0]) / width), len(counts) - 1)] += 1
    return counts


def scatter(
    label: str, points: Sequence[tuple[float, float]], *, x_label: str, tone: str, quadrant: str = ""
) -> Markup:
    """Points around two lines at 0; the quadrant with x above and y below 0 is shaded and has a text."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, y_ticks = (ticks(*limits(values, include=[0.0])) for values in (xs, ys))
    frame = Frame(x_ticks=x_ticks, y_ticks=y_ticks, x_label=x_label)
    zero_x, zero_y = frame.x(0), frame.y(0)
    parts = [frame.draw()]
    if quadrant:
        size = f'width="{WIDTH - RIGHT - zero_x:.1f}" height="{HEIGHT - BOTTOM - zero_y:.1f}"'
        parts.append(Markup(f'<rect class="region" x="{zero_x:.1f}" y="{zero_y:.1f}" {size}/>'))
    axes = f"M{LEFT:.1f} {zero_y:.1f}H{WIDTH - RIGHT:.1f}M{zero_x:.1f} {TOP:.1f}V{HEIGHT - BOTTOM:.1f}"
    parts.append(Markup(f'<path class="zero" d="{axes}"/>'))
    dots = "".join(f"M{frame.x(x):.1f} {frame.y(y):.1f}h0" for x, y in points)
    parts.append(Markup(f'<path class="dots s-{escape(tone)}" d="{dots}"/>'))
    if quadrant:
        parts.append(_text(WIDTH - RIGHT - 4, HEIGHT - BOTTOM - 6, quadrant, anchor="end", tone="note"))
    return _svg(label, parts)


def _svg(label: str, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        f"{WIDTH:.0f}", f"{HEIGHT:.0f}", label
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def _text(x: float, y: float, text: str, *, anchor: str = "start", tone: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        tone, f"{x:.1f}", f"{y:.1f}", anchor, text
    )


def _line(series: Series, xs: Sequence[float], frame: Frame, shape: str) -> Markup:
    path, markers, is_open = "", "", False
    for x, value in zip(xs, series.values, strict=True):
        if value is None:
            is_open = False
            continue
        at = f"{frame.x(x):.1f} {frame.y(value):.1f}"
        path += f"{'L' if is_open else 'M'}{at}"
        markers += f'<path class="point s-{escape(series.tone)}" transform="translate({at})" d="{shape}"/>'
        is_open = True
    few = sum(value is not None for value in series.values) <= MAX_MARKERS
    return Markup(f'<path class="line s-{escape(series.tone)}" d="{path}"/>' + (markers if few else ""))


def _marks(marks: Marks, frame: Frame) -> Markup:
    parts = []
    if marks.region:
        start, end, text = marks.region
        left, right = frame.x(start), frame.x(end)
        box = f'x="{left:.1f}" y="{TOP:.1f}" width="{right - left:.1f}" height="{HEIGHT - BOTTOM - TOP:.1f}"'
        parts += [Markup(f'<rect class="region" {box}/>'), _text(right - 2, TOP - 6, text, anchor="end", tone="note")]
    for value, text in marks.y:
        at = frame.y(value)
        parts.append(Markup(f'<path class="limit" d="M{LEFT:.1f} {at:.1f}H{WIDTH - RIGHT:.1f}"/>'))
        parts.append(_text(WIDTH - RIGHT - 2, at + 13, text, anchor="end", tone="note"))
    for value, text in marks.x:
        at = frame.x(value)
        parts.append(Markup(f'<path class="mark" d="M{at:.1f} {TOP:.1f}V{HEIGHT - BOTTOM:.1f}"/>'))
        is_left = at < (LEFT + WIDTH) / 2
        parts.append(_text(at, TOP - 6, text, anchor="start" if is_left else "end", tone="note"))
    return Markup("").join(parts)


def _hits(tips: Sequence[tuple[float, Sequence[str]]]) -> Iterator[Markup]:
    """Invisible bands around the xs (in pixels), each with a line and a box of texts that appear under the pointer."""
    order = sorted(tips, key=lambda tip: tip[0])
    for number, (at, lines) in enumerate(order):
        left = LEFT if number == 0 else (order[number - 1][0] + at) / 2
        right = WIDTH - RIGHT if number == len(order) - 1 else (at + order[number + 1][0]) / 2
        width, height = max(map(len, lines)) * CHAR + 14, len(lines) * LINE + 8
        x = at + 8 if at + 8 + width <= WIDTH else max(at - 8 - width, 0.0)
        rows = Markup("").join(
            Markup('<tspan x="{}" dy="{}">{}</tspan>').format(f"{x + 7:.1f}", f"{LINE:.0f}", line) for line in lines
        )
        yield Markup(
            f'<g class="hit"><rect class="band" x="{left:.1f}" y="{TOP:.1f}" width="{max(right - left, 0.5):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM:.1f}"/><path class="cross" d="M{at:.1f} {TOP:.1f}V{HEIGHT - BOTTOM:.1f}"/>'
            f'<g class="tip"><rect class="box" x="{x:.1f}" y="{TOP + 4:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5"/>'
            f'<text y="{TOP + 5:.1f}">{rows}</text></g></g>'
        )
