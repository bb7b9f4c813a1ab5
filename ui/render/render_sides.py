"""The sides of a comparison, each with its clock, its cost, and the predictions of the judge."""

from collections.abc import Sequence
from html import escape

from studio.ui.jobs.compare_job import Comparison, Side
from studio.ui.tabs.components import duration, progress_bar


def render_sides(found: Comparison) -> str:
    """HTML of the sides of a comparison, shown below their images."""
    cards = "".join(
        _card(side, found.seconds if number == found.running else None) for number, side in enumerate(found.sides)
    )
    return f'<div class="studio-lanes studio-sides">{cards}</div>{_judge_note(found)}{_quality_chart(found)}'


def side_seconds(side: Side) -> float:
    """The seconds of a finished side for one image."""
    return side.stats.seconds["total"] / len(side.images)


def comparison_verdict(found: Comparison) -> str:
    """One sentence on the fastest side of a finished comparison."""
    *_, slowest = ranked = sorted(found.sides, key=side_seconds)
    fastest = ranked[0]
    factor = side_seconds(slowest) / max(side_seconds(fastest), 1e-9)
    pace = f"{duration(side_seconds(fastest))} an image, {factor:.1f} times as fast as {slowest.title}"
    return f"Fastest: {fastest.title}, {pace}."


def _card(side: Side, running: float | None) -> str:
    """A side; `running` are its seconds so far while it samples, else `None`."""
    state = "done" if side.stats else "waiting" if running is None else "running"
    seconds = side.stats.seconds["total"] if side.stats else running or 0
    fraction = side.sampled / side.total if side.total else 0
    return (
        f'<section class="studio-lane {state}"><h3>{escape(side.title)}</h3>'
        f'<p class="clock">{seconds:.2f}<span> s</span></p>'
        f"{progress_bar(fraction, f'Tokens of {side.title}')}{_cost(side)}{_judge_predictions(side)}</section>"
    )


def _cost(side: Side) -> str:
    if not side.stats:
        return ""
    stats = side.stats
    facts = [
        ("calls of the model", f"{stats.target_calls}"),
        ("tokens per call", f"{stats.mean_accepted_length:.2f}"),
        ("accepted drafts", _accepted(side)),
    ]
    if "approximate" in side.request.how:
        facts.append(("images", "approximate"))
    return _facts(facts)


def _accepted(side: Side) -> str:
    """The number of accepted drafts of the first image, or the acceptance rate."""
    if side.trace:
        return f"{len(side.trace.accepted)} of {side.total} tokens"
    return "none made" if side.stats.acceptance is None else f"{side.stats.acceptance:.0%}"


def _judge_predictions(side: Side) -> str:
    """The predictions of the judge for each image and its score, or the reason why there is none."""
    unscored = f'<p class="studio-note">No judge score. {escape(side.unscored)}</p>' if side.unscored else ""
    if not side.judge_predictions:
        return unscored
    seen = "".join(
        f"<li>{escape(prediction.concept)} <span>{prediction.certainty:.0%}, {escape(prediction.style)}, "
        f"{escape(prediction.background)}</span></li>"
        for prediction in side.judge_predictions
    )
    return f"<h4>The judge sees</h4><ul>{seen}</ul>{_agreement(side)}{unscored}"


def judge_score(side: Side) -> float | None:
    """The mean probability that the judge gives to the prompt; `None` where the prompt names no concept it knows."""
    scores = [prediction.agreement for prediction in side.judge_predictions if prediction.agreement is not None]
    return sum(scores) / len(scores) if scores else None


def _agreement(side: Side) -> str:
    score = judge_score(side)
    return "" if score is None else _facts([("judge score", f"{score:.0%}")])


def _judge_note(found: Comparison) -> str:
    from studio.evaluation.judge_predictions import WHAT_IT_IS

    if not any(side.judge_predictions for side in found.sides):
        return ""
    scored = any(judge_score(side) is not None for side in found.sides)
    score = " Its score is the probability it gives to the prompt." if scored else ""
    return f'<p class="studio-note">{escape(WHAT_IT_IS + score)}</p>'


def _quality_chart(found: Comparison) -> str:
    """A chart of score over seconds, once all sides are done and at least two have a score."""
    from studio.bench.chart import Series, chart

    points = [(side, judge_score(side)) for side in found.sides if side.stats]
    series = [
        Series(side.title, ((side_seconds(side), 100 * score),), joined=False)
        for side, score in points
        if score is not None
    ]
    if not found.finished or len(series) < 2:
        return ""
    count = len(found.sides[0].images)
    title = f"Score of {count} image{'s' * (count != 1)} each: an example, not a measurement"
    return f'<div class="studio-chart">{chart(title, "seconds an image", "judge score, %", series)}</div>'


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in facts)}</dl>"
