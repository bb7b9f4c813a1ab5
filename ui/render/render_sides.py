"""The sides of a comparison, each with its clock, what it cost, and what the judge sees in its images."""

from html import escape

from studio.ui.tabs.components import duration, progress_bar


def render_sides(found):
    """Lay out the sides of a `Comparison` below their images."""
    cards = "".join(
        _card(side, found.seconds if number == found.running else None) for number, side in enumerate(found.sides)
    )
    return f'<div class="studio-lanes studio-sides">{cards}</div>{_judge_note(found)}{_quality_chart(found)}'


def side_seconds(side):
    """Seconds that a side took for one image."""
    return side.stats.seconds["total"] / len(side.images)


def comparison_verdict(found):
    """One sentence on who was fastest."""
    *_, slowest = ranked = sorted(found.sides, key=side_seconds)
    fastest = ranked[0]
    factor = side_seconds(slowest) / max(side_seconds(fastest), 1e-9)
    pace = f"{duration(side_seconds(fastest))} an image, {factor:.1f} times as fast as {slowest.title}"
    return f"Fastest: {fastest.title}, {pace}."


def _card(side, running):
    """A side; `running` are its seconds so far while it samples, else `None`."""
    state = "done" if side.stats else "waiting" if running is None else "running"
    seconds = side.stats.seconds["total"] if side.stats else running or 0
    share = side.sampled / side.total if side.total else 0
    return (
        f'<section class="studio-lane {state}"><h3>{escape(side.title)}</h3>'
        f'<p class="clock">{seconds:.2f}<span> s</span></p>'
        f"{progress_bar(share, f'Tokens of {side.title}')}{_cost(side)}{_judge_predictions(side)}</section>"
    )


def _cost(side):
    if not side.stats:
        return ""
    stats = side.stats
    facts = [
        ("calls of the model", f"{stats.target_calls}"),
        ("tokens a call", f"{stats.mean_accepted_length:.2f}"),
        ("accepted drafts", _accepted(side)),
    ]
    if "approximate" in side.request.how:
        facts.append(("images", "approximate"))
    return _facts(facts)


def _accepted(side):
    """How many of the first image's tokens were drafts, or what share of the drafts passed."""
    if side.trace:
        return f"{len(side.trace.accepted)} of {side.total} tokens"
    return "none made" if side.stats.acceptance is None else f"{side.stats.acceptance:.0%}"


def _judge_predictions(side):
    """What the judge sees in each image, and how likely it finds what the words name, or why it cannot say."""
    unscored = f'<p class="studio-note">No judge score. {escape(side.unscored)}</p>' if side.unscored else ""
    if not side.judge_predictions:
        return unscored
    seen = "".join(
        f"<li>{escape(prediction.concept)} <span>{prediction.certainty:.0%}, {escape(prediction.style)}, "
        f"{escape(prediction.background)}</span></li>"
        for prediction in side.judge_predictions
    )
    return f"<h4>The judge sees</h4><ul>{seen}</ul>{_agreement(side)}{unscored}"


def judge_score(side):
    """How likely the judge finds what the words name, on average; `None` where they name nothing it knows."""
    scores = [prediction.agreement for prediction in side.judge_predictions if prediction.agreement is not None]
    return sum(scores) / len(scores) if scores else None


def _agreement(side):
    score = judge_score(side)
    return "" if score is None else _facts([("judge score", f"{score:.0%}")])


def _judge_note(found):
    from studio.evaluation.judge_predictions import WHAT_IT_IS

    if not any(side.judge_predictions for side in found.sides):
        return ""
    scored = any(judge_score(side) is not None for side in found.sides)
    score = " Its score is how likely it finds what the words name." if scored else ""
    return f'<p class="studio-note">{escape(WHAT_IT_IS + score)}</p>'


def _quality_chart(found):
    """Score over seconds, once all have sampled and at least two have a score."""
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


def _facts(facts):
    return f"<dl>{''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in facts)}</dl>"
