"""Two decodings side by side, each with its clock, its progress and its tokens."""

from html import escape

from studio.ui.jobs.side_by_side import Run, SideBySide
from studio.ui.render.token_grid import token_grid
from studio.ui.tabs.components import duration, progress_bar


def render_side_by_side(state: SideBySide) -> str:
    """HTML of both decodings, shown below their images."""
    return f'<div class="studio-lanes">{"".join(_run(run) for run in state.runs)}</div>'


def side_by_side_verdict(state: SideBySide) -> str:
    """One sentence on which decoding was faster."""
    plain, other = state.runs
    if other.clock <= plain.clock:
        factor = f"{plain.clock / max(other.clock, 1e-9):.2f} times as fast"
    else:
        factor = f"slower here, by a factor of {other.clock / max(plain.clock, 1e-9):.2f}"
    return f"{other.title} took {duration(other.clock)}, plain {duration(plain.clock)}: {factor}."


def _run(run: Run) -> str:
    progress = "done" if run.stats else "running"
    facts = ""
    if run.stats:
        facts = (
            f"<dl><div><dt>calls of the model</dt><dd>{run.stats.target_calls}</dd></div>"
            f"<div><dt>tokens per call</dt><dd>{run.stats.mean_accepted_length:.2f}</dd></div></dl>"
        )
    grid = token_grid(run.trace, f"Tokens of {run.title}") if run.trace else ""
    return (
        f'<section class="studio-lane {progress}"><h3>{escape(run.title)}</h3>'
        f'<p class="clock">{run.clock:.2f}<span> s</span></p>'
        f"{progress_bar(run.sampled / run.total, f'Tokens of {run.title}')}{facts}{grid}</section>"
    )
