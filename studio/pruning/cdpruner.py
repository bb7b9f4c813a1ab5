"""CDPruner: tokens that are diverse, given the question.

"Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv:2506.10967). The
kept set maximises the determinant of the kernel

    K = diag(r) X X' diag(r),   rows of X of norm 1,   r the relevance to the question, from 0 to 1,

greedily (MAP inference of a determinantal point process, by incremental Cholesky): O(k^2 N) without a determinant.

Deviations from the authors' code, each with its reason:
- relevance is the mean cosine with the question's input embeddings, as in OpenVINO GenAI; theirs needs the text tower
  of CLIP, which vision-language models do not have;
- 1e-4 on the diagonal of K and variances of 1e-12 at least: theirs repeats tokens and gives NaN above the rank of K;
- the budget is met exactly and newlines stay with their rows.
"""

import torch
import torch.nn.functional as F

from studio.checks import check_number
from studio.errors import StudioError
from studio.pruning.attention import Attention
from studio.pruning.layout import Layout
from studio.pruning.newlines import in_order


def cdpruner(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
    text: torch.Tensor | None = None,
    theta: float | None = None,
) -> torch.Tensor:
    """Keeps tokens that are diverse and relevant to the question.

    Args:
        features: (T, D), what the language model receives for the image.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention, generator: not needed.
        layout: where the newlines are; without one there are none.
        newline: "row", "keep" or "drop" (see `with_newlines`).
        text: (m, D) input embeddings of the question.
        theta: from 0, diversity alone, to 1 (excluded), relevance alone: r is then exp(theta / (2 (1 - theta)) r).

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: no text, or a budget, layout, newline or theta that does not fit.
    """
    if theta is not None:
        theta = check_number("theta, the weight of relevance,", theta, 0, 0.999)

    def order(places: torch.Tensor, picks: int) -> torch.Tensor:
        rows = features[places]
        return map_order(rows, relevance(rows, text_of("cdpruner", text), theta), picks)

    return in_order(features, budget, layout, newline, order)


def text_of(method: str, text: torch.Tensor | None) -> torch.Tensor:
    """The embeddings of a question, checked.

    Raises:
        StudioError: none.
    """
    if text is None or not len(text):
        raise StudioError(f"{method} needs the question behind the image: put text after it, or use divprune.")
    return text


def relevance(features: torch.Tensor, text: torch.Tensor, theta: float | None = None) -> torch.Tensor:
    """(T,) float32, r: the mean cosine of each token with the text (m, D), brought to (0, 1] by minimum and maximum."""
    unit = F.normalize(features.detach().float(), dim=1, eps=1e-12)
    asked = F.normalize(text.detach().float().to(unit.device), dim=1, eps=1e-12).mean(dim=0)
    cosine = unit @ asked
    r = (cosine - cosine.min() + 1e-6) / (cosine.max() - cosine.min() + 1e-6)
    return r if theta is None else (theta / (2 * (1 - theta)) * r).exp()


def map_order(features: torch.Tensor, weight: torch.Tensor, picks: int) -> torch.Tensor:
    """Greedy MAP of the kernel: `picks` different rows of features (N, D), in the order they are chosen."""
    rows = F.normalize(features.detach().float(), dim=1, eps=1e-12) * weight[:, None]
    variance, factors, order = rows.square().sum(dim=1) + 1e-4, rows.new_zeros(picks, len(rows)), []
    chosen = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for step in range(picks):
        pick = variance.masked_fill(chosen, -torch.inf).argmax(dim=0, keepdim=True)
        order.append(pick)
        chosen[pick] = True
        row = rows @ rows.index_select(0, pick)[0]
        before = factors[:step]
        factors[step] = (row - before.index_select(1, pick)[:, 0] @ before) / variance[pick].sqrt()
        variance = (variance - factors[step].square()).clamp(min=1e-12)
    return torch.cat(order)
