"""Random pruning, the baseline every method must beat (it is a strong one: UniPruneBench)."""

import torch

from studio.errors import StudioError
from studio.pruning.budget import count
from studio.pruning.layout import Layout, layout_for
from studio.pruning.newlines import check_newline, with_newlines


def random(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention=None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
) -> torch.Tensor:
    """Keeps tokens of one picture at random, all with the same chance.

    Args:
        features: (T, D), what the language model receives for the picture; only T is used.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention: not needed.
        layout: where the newlines are; without one there are none.
        generator: the source of randomness, required unless all tokens stay.
        newline: "row", "keep", "drop" (see `with_newlines`) or "compete" (newlines are tokens like any other).

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Errors: `StudioError` without a generator, and for a budget, layout or newline that does not fit.
    """
    layout = layout_for(features, layout)
    check_newline(newline, compete=True)
    budget = count(budget, len(features))
    if budget == len(features):
        return torch.arange(len(features), device=features.device)
    if generator is None:
        raise StudioError("Random pruning needs a generator: give generator=torch.Generator().manual_seed(0).")
    content = torch.arange(len(features)) if newline == "compete" else layout.content
    order = content[torch.randperm(len(content), generator=generator, device=generator.device).cpu()]
    if newline == "compete":
        return order[:budget].sort().values.to(features.device)
    return with_newlines(lambda picks: order[:picks], budget, layout, newline).to(features.device)
