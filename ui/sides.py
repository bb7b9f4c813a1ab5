"""The sides of a comparison, each with its clock, what it cost, and what the judge sees in its pictures."""

from html import escape

from studio.ui.components import duration, progress_bar


def side_cards(found):
    """Lay out the sides of a `Comparison` below their pictures."""
    cards = "".join(_card(side, number == found.running) for number, side in enumerate(found.sides))
    return f'<div class="studio-lanes studio-sides">{cards}</div>{_judge_note(found)}'


def side_seconds(side):
    """Seconds that a side took for one picture."""
    return side.stats.seconds["total"] / len(side.pictures)


def comparison_verdict(found):
    """One sentence on who was fastest."""
    *_, slowest = ranked = sorted(found.sides, key=side_seconds)
    fastest = ranked[0]
    factor = side_seconds(slowest) / max(side_seconds(fastest), 1e-9)
    pace = f"{duration(side_seconds(fastest))} a picture, {factor:.1f} times as fast as {slowest.title}"
    return f"Fastest: {fastest.title}, {pace}."


def _card(side, running):
    state = "done" if side.stats else "running" if running else "waiting"
    share = side.drawn / side.total if side.total else 0
    clock = f"{side.stats.seconds['total']:.2f}<span> s</span>" if side.stats else "<span>–</span>"
    return (
        f'<section class="studio-lane {state}"><h3>{escape(side.title)}</h3><p class="clock">{clock}</p>'
        f"{progress_bar(share, f'Tokens of {side.title}')}{_cost(side)}{_opinions(side)}</section>"
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
    if "approximate" in side.wish.how:
        facts.append(("pictures", "approximate"))
    return _facts(facts)


def _accepted(side):
    """How many of the first picture's tokens were drafts, or what share of the drafts passed."""
    if side.fates:
        return f"{len(side.fates.accepted)} of {side.total} tokens"
    return "none made" if side.stats.acceptance is None else f"{side.stats.acceptance:.0%}"


def _opinions(side):
    """What the judge sees in each picture, and in how many of them what the words name."""
    if not side.opinions:
        return ""
    seen = "".join(
        f"<li>{escape(opinion.concept)} <span>{opinion.certainty:.0%}, {escape(opinion.style)}, "
        f"{escape(opinion.background)}</span></li>"
        for opinion in side.opinions
    )
    return f"<h4>The judge sees</h4><ul>{seen}</ul>{_agreement(side)}"


def _agreement(side):
    scores = [opinion.agreement for opinion in side.opinions if opinion.agreement is not None]
    return _facts([("judge score", f"{sum(scores) / len(scores):.0%}")]) if scores else ""


def _judge_note(found):
    from studio.evaluation.opinions import WHAT_IT_IS

    judged = [side for side in found.sides if side.opinions]
    if not judged:
        return ""
    score = ""
    if any(opinion.agreement is not None for side in judged for opinion in side.opinions):
        score = " Its score is how likely it finds what the words name."
    return f'<p class="studio-note">{escape(WHAT_IT_IS + score)}</p>'


def _facts(facts):
    return f"<dl>{''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in facts)}</dl>"
