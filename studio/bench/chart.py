"""Small charts as SVG text: lines and points over two axes, readable on a light and a dark page."""

from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 44, 54
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#555555", "#7b3fb5")


@dataclass(frozen=True)
class Series:
    """One series of points.

    Args:
        name: what the legend says.
        points: (x, y) pairs, in the order in which a line joins them.
        labels: a word beside each point; none when empty.
        joined: whether a line joins the points.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    labels: tuple[str, ...] = ()
    joined: bool = True


def chart(
    title: str, x_name: str, y_name: str, series: list[Series], *, log_x: bool = False, least_height: float = 0.0
) -> str:
    """The chart as an SVG document.

    Args:
        x_name, y_name: what the axes say.
        log_x: whether the horizontal axis is logarithmic; all x are then above 0.
        least_height: what the vertical axis spans at least, so that differences that mean nothing look it.
    """
    points = [point for each in series for point in each.points]
    across = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, log_x)
    up = _Axis([y for _, y in points], HEIGHT - BOTTOM, TOP, False, least_height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
        _text(LEFT, 26, title, size=16),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name, anchor="middle"),
        f'<g transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{_text(0, 0, y_name, "middle")}</g>',
    ]
    for value in across.ticks:
        x = across.place(value)
        parts += [_line(x, TOP, x, HEIGHT - BOTTOM, "#e4e4e4"), _text(x, HEIGHT - BOTTOM + 18, f"{value:g}", "middle")]
    for value in up.ticks:
        y = up.place(value)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#e4e4e4"), _text(LEFT - 8, y + 4, f"{value:g}", "end")]
    for number, each in enumerate(series):
        color, places = COLORS[number % len(COLORS)], [(across.place(x), up.place(y)) for x, y in each.points]
        if each.joined and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>' for x, y in places]
        parts += [_text(x + 8, y - 7, label, size=11) for (x, y), label in zip(places, each.labels)]
        height = TOP + 12 + 22 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 22}" cy="{height - 4}" r="4.5" fill="{color}"/>')
        parts.append(_text(WIDTH - RIGHT + 34, height, each.name))
    return "\n".join((*parts, "</svg>")) + "\n"


class _Axis:
    """From values to places in the image, with room at both ends."""

    def __init__(self, values, start, end, logarithmic, least=0.0):
        self.scale = log10 if logarithmic else float
        low, high = self.scale(min(values)), self.scale(max(values))
        missing = max(0.0, least - (high - low)) / 2
        low, high = low - missing, high + missing
        room = 0.08 * (high - low) or 0.5
        self.low, self.high, self.start, self.end = low - room, high + room, start, end
        self.ticks = self._powers() if logarithmic else self._steps()

    def place(self, value):
        return self.start + (self.scale(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def _steps(self):
        rough = (self.high - self.low) / 5
        unit = 10 ** floor(log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = -floor(-self.low / step)
        return [round(step * number, 10) for number in range(first, floor(self.high / step) + 1)]

    def _powers(self):
        exponents = range(floor(self.low), floor(self.high) + 1)
        for factors in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [part / 10 for part in range(10, 100)]):
            values = [round(factor * 10.0**exponent, 12) for exponent in exponents for factor in factors]
            if len(ticks := [value for value in values if self.low <= log10(value) <= self.high]) > 2:
                break
        return ticks


def _text(x, y, words, anchor="start", size=13):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def _line(x1, y1, x2, y2, color):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'
