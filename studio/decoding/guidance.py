"""How classifier-free guidance grows while an image is sampled.

"ELM: Elucidating the design space of language models for image generation" (arXiv:2410.16257): the scale rises linearly
over the tokens of an image, `s_t = 1 + (s - 1)(t + 1) / n` for token t of n, so that the first ones stay varied and the
last ones follow the prompt. In loops that sample several tokens a call, the share of the image takes the place of
(t + 1) / n.
"""

from studio.checks import check_choice

SCHEDULES = ("constant", "linear")


def check_schedule(schedule: str | None) -> None:
    """Raises a `StudioError` for what is neither a schedule nor None."""
    if schedule is not None:
        check_choice("guidance_schedule", schedule, SCHEDULES)


def scheduled_scale(schedule: str | None, scale: float, share: float) -> float:
    """The guidance scale where this share of an image is sampled.

    Args:
        schedule: one of `SCHEDULES`; None is constant.
        scale: at its greatest.
        share: in [0, 1].
    """
    return 1 + (scale - 1) * share if schedule == "linear" else scale
