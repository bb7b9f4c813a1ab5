"""The two sides of a race, each with its clock, its bar and its tokens."""

from html import escape

from studio.ui.render.token_grid import token_grid
from studio.ui.tabs.components import duration, progress_bar


def render_side_by_side(race):
    """Lay out both sides of a race below their images."""
    return f'<div class="studio-lanes">{"".join(_lane(lane) for lane in race.lanes)}</div>'


def side_by_side_verdict(race):
    """One sentence on who was faster."""
    plain, other = race.lanes
    if other.clock <= plain.clock:
        factor = f"{plain.clock / max(other.clock, 1e-9):.2f} times as fast"
    else:
        factor = f"slower here, by a factor of {other.clock / max(plain.clock, 1e-9):.2f}"
    return f"{other.title} took {duration(other.clock)}, plain {duration(plain.clock)}: {factor}."


def _lane(lane):
    state = "done" if lane.stats else "running"
    facts = ""
    if lane.stats:
        facts = (
            f"<dl><div><dt>calls of the model</dt><dd>{lane.stats.target_calls}</dd></div>"
            f"<div><dt>tokens a call</dt><dd>{lane.stats.mean_accepted_length:.2f}</dd></div></dl>"
        )
    grid = token_grid(lane.trace, f"Tokens of {lane.title}") if lane.trace else ""
    return (
        f'<section class="studio-lane {state}"><h3>{escape(lane.title)}</h3>'
        f'<p class="clock">{lane.clock:.2f}<span> s</span></p>'
        f"{progress_bar(lane.sampled / lane.total, f'Tokens of {lane.title}')}{facts}{grid}</section>"
    )
