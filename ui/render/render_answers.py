"""Answers side by side: the text, the number of visual tokens, and the seconds of each phase."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from studio.ui.tabs.components import duration

if TYPE_CHECKING:
    from studio.pipelines.visual_question import Answer

_SHORT = 80  # characters that are shown large
PHASES = ("encode", "select", "prefill", "decode")


def render_answers(answers: "Sequence[tuple[str, Answer | None]]", running: int | None = None) -> str:
    """Render answers as cards whose bars share one scale.

    Args:
        answers: pairs (title, answer), with `None` for an answer that is still to come.
        running: the index of the one under way, or `None`.

    Returns:
        HTML.
    """
    longest = max((sum(answer.seconds.values()) for _, answer in answers if answer), default=0)
    cards = "".join(_card(title, answer, longest, number == running) for number, (title, answer) in enumerate(answers))
    return f'<div class="studio-answers">{cards}</div>'


def _card(title: str, answer: "Answer | None", longest: float, running: bool) -> str:
    state = "running" if running else "waiting" if answer is None else "done"
    text, cost = (answer.answer, _cost(answer, longest)) if answer else ("", "")
    size = "said" if len(text) <= _SHORT else "said long"
    return (
        f'<section class="studio-answer {state}"><h3>{escape(title)}</h3>'
        f'<p class="{size}">{escape(text)}</p>{cost}</section>'
    )


def _cost(answer: "Answer", longest: float) -> str:
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
        f"<span>{answer.kept_tokens} of {answer.visual_tokens} visual tokens{_tower(answer)}{_cache(answer)}</span></p>"
        f'<div class="studio-phases" aria-hidden="true">{bars}</div><dl>{facts}</dl>'
    )


def _tower(answer: "Answer") -> str:
    """What merging left in the vision tower."""
    tower = answer.tower
    return f" · {tower.patches} patches became {tower.tokens} tokens in the tower" if tower else ""


def _cache(answer: "Answer") -> str:
    """The size of the cache, known at the end of an answer, and at once where it is kept between questions."""
    return f" · cache {answer.cache_bytes / 1024:,.0f} KiB" if answer.cache_bytes else ""


def verdict(pruned: "Answer", whole: "Answer") -> str:
    """One sentence on what pruning changed."""
    fast, slow = (sum(answer.seconds.values()) for answer in (pruned, whole))
    if abs(fast - slow) < 0.05 * slow:
        pace = "As fast as with all tokens"
    elif fast < slow:
        pace = f"{slow / max(fast, 1e-9):.1f} times as fast as with all tokens"
    else:
        pace = f"Slower than with all tokens, by {duration(fast - slow)}"
    same = pruned.answer == whole.answer
    return f"{pace}; the answer is {'the same' if same else 'different'}."
