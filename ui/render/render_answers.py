"""Answers beside each other: what was said, from how many tokens, and where the time went."""

from html import escape

from studio.ui.tabs.components import duration

_SHORT = 80  # characters that are shown large
PHASES = ("encode", "select", "prefill", "decode")


def render_answers(answers, running=None):
    """Lay answers out as cards whose bars share one scale.

    Args:
        answers: pairs (title, `Answer` or `None` where it is still to come).
        running: number of the card that is being answered, or `None`.
    """
    longest = max((sum(answer.seconds.values()) for _, answer in answers if answer), default=0)
    cards = "".join(_card(title, answer, longest, number == running) for number, (title, answer) in enumerate(answers))
    return f'<div class="studio-answers">{cards}</div>'


def _card(title, answer, longest, running):
    state = "running" if running else "waiting" if answer is None else "done"
    text, cost = (answer.answer, _cost(answer, longest)) if answer else ("", "")
    said = "said" if len(text) <= _SHORT else "said long"
    return (
        f'<section class="studio-answer {state}"><h3>{escape(title)}</h3>'
        f'<p class="{said}">{escape(text)}</p>{cost}</section>'
    )


def _cost(answer, longest):
    seconds = {phase: answer.seconds[phase] for phase in PHASES}
    bars = "".join(
        f'<i class="{phase}" style="width:{100 * spent / max(longest, 1e-9):.2f}%"></i>'
        for phase, spent in seconds.items()
    )
    facts = "".join(
        f'<div class="{phase}"><dt>{phase}</dt><dd>{duration(spent)}</dd></div>' for phase, spent in seconds.items()
    )
    return (
        f"<p class='cost'><b>{duration(sum(seconds.values()))}</b> "
        f"<span>{answer.kept_tokens} of {answer.visual_tokens} visual tokens</span></p>"
        f'<div class="studio-phases" aria-hidden="true">{bars}</div><dl>{facts}</dl>'
    )


def verdict(pruned, whole):
    """One sentence on what pruning changed."""
    fast, slow = (sum(answer.seconds.values()) for answer in (pruned, whole))
    if abs(fast - slow) < 0.05 * slow:
        pace = "As fast as with all tokens"
    elif fast < slow:
        pace = f"{slow / max(fast, 1e-9):.1f} times as fast as with all tokens"
    else:
        pace = f"Slower than with all tokens, by {duration(fast - slow)}"
    same = pruned.answer == whole.answer
    return f"{pace}; the answer is {'the same' if same else 'another'}."
