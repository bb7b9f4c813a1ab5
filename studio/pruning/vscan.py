"""VScan: local and global scans of the image, merging, and a second cut in the middle of the language model.

"VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models" (arXiv:2505.22654). Before the
language model, half of the tokens are those that the CLS token attends to in an early layer of the vision tower, an
equal number from each window of 6 x 6 tokens (local scan); the other half are those it attends to in the layer that
makes the features (global scan). Every other token is averaged into the chosen one with the most similar features. In
the language model, the tokens with the most attention of the prompt's last token stay after a middle layer
(`studio.pruning.inside_model`).

Deviations from the authors' code, each with its reason:
- positions stay those of the whole prompt; theirs counts anew;
- partitions (thumbnail and crops) get tokens in proportion to their size, and the budget is met exactly;
- of both cuts each leaves the same share of what reaches it, so that `keep` is left at the end.
"""

import torch
import torch.nn.functional as F

from studio.pruning.attention import Attention, scores_for
from studio.pruning.budget import apportion, count
from studio.pruning.layout import Layout, layout_for
from studio.pruning.newlines import check_newline, with_newlines

WINDOW = 6


def vscan(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
) -> torch.Tensor:
    """Keeps what the CLS token looks at early, in every window, and late, in the whole image.

    Args:
        features: (T, D), what the language model receives for the image; only T is used.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention: with `shallow` and `last`.
        layout: partitions and newlines; without one all tokens are one partition.
        generator: not needed.
        newline: "row", "keep" or "drop" (see `with_newlines`).

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: missing attention, or a budget, layout or newline that does not fit.
    """
    layout = layout_for(features, layout)
    check_newline(newline, compete=False)
    budgeted = count(budget, len(features))
    if budgeted == len(features):
        return torch.arange(len(features), device=features.device)
    shallow, last = (scores_for("VScan", name, attention, layout) for name in ("shallow", "last"))
    regions = [layout.region(partition) for partition in range(layout.partitions)]
    caps = [len(region) for region in regions]

    def pick(tokens: int) -> torch.Tensor:
        shares = apportion(tokens, [float(cap) for cap in caps], caps)
        scores = zip(regions, shares, shallow, last)
        return torch.cat([_scan(region, share, early, late, layout) for region, share, early, late in scores])

    return with_newlines(pick, budgeted, layout, newline).to(features.device)


def _scan(region: torch.Tensor, tokens: int, early: torch.Tensor, late: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`tokens` places of one partition."""
    number = layout.token[region]
    across = -(-layout.size[1] // WINDOW)
    window = number.div(layout.size[1] * WINDOW, rounding_mode="floor") * across
    window = window + number.remainder(layout.size[1]).div(WINDOW, rounding_mode="floor")
    groups = [(window == each).nonzero().flatten() for each in window.unique()]
    numbers = apportion(tokens // 2, [1.0] * len(groups), [len(group) for group in groups])
    chosen = torch.zeros(len(region), dtype=torch.bool)
    for group, most in zip(groups, numbers):
        chosen[group[early[number[group]].argsort(descending=True, stable=True)[:most]]] = True
    rest = late[number].masked_fill(chosen, -torch.inf).argsort(descending=True, stable=True)
    chosen[rest[: tokens - int(chosen.sum())]] = True
    return region[chosen]


def merged(features: torch.Tensor, kept: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(T, D) features in which each kept token is the mean of itself and of all tokens that are most like it.

    Newlines neither join others nor are joined.
    """
    content = layout.content
    stays = content[torch.isin(content, kept.cpu())].to(features.device)
    goes = content[~torch.isin(content, kept.cpu())].to(features.device)
    if not len(stays) or not len(goes):
        return features
    unit = F.normalize(features.float(), dim=1, eps=1e-12)
    partner = (unit[goes] @ unit[stays].T).argmax(dim=1)
    total = features[stays].float().index_add(0, partner, features[goes].float())
    counts = torch.ones(len(stays), 1, device=features.device).index_add(
        0, partner, torch.ones_like(partner[:, None]).float()
    )
    out = features.clone()
    out[stays] = (total / counts).to(features.dtype)
    return out
