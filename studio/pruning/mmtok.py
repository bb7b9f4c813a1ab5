"""MMTok: tokens that cover the question and the image.

"MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs" (arXiv:2508.18264). With the question's
embeddings e (m, D), the tokens x (N, D), and rows of norm 1,

    P = softmax(e x' / 0.02) / m,   Q = softmax(x x' / 0.2) / N,   A = [P; Q / 2],

the kept set maximises the sum over the rows of A of their largest kept entry, greedily: a submodular function, of which
the greedy set has at least 1 - 1/e of the best.

Deviations from the authors' code, each with its reason:
- both parts use the features that the language model receives, so that any family works; theirs takes Q from features
  before the projector;
- all tokens of the question count, also words without meaning, because token ids tell no words;
- batches, several images, exact budgets, newlines with their rows.
"""

import torch
import torch.nn.functional as F

from studio.pruning.attention import Attention
from studio.pruning.cdpruner import text_of
from studio.pruning.layout import Layout
from studio.pruning.newlines import in_order
from studio.pruning.scope import greedy_coverage


def mmtok(
    features: torch.Tensor,
    budget: int | float,
    *,
    attention: Attention | None = None,
    layout: Layout | None = None,
    generator: torch.Generator | None = None,
    newline: str = "row",
    text: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keeps tokens that cover the question and the image.

    Args:
        features: (T, D), what the language model receives for the image.
        budget: tokens to keep, newlines included, or a fraction in (0, 1] of T.
        attention, generator: not needed.
        layout: where the newlines are; without one there are none.
        newline: "row", "keep" or "drop" (see `with_newlines`).
        text: (m, D) input embeddings of the question.

    Returns:
        Kept places, long, sorted, on the device of the features; all of them for a fraction of 1.

    Raises:
        StudioError: no text, or a budget, layout or newline that does not fit.
    """

    def order(places: torch.Tensor, picks: int) -> torch.Tensor:
        asked = F.normalize(text_of("mmtok", text).detach().float().to(features.device), dim=1, eps=1e-12)
        rows = F.normalize(features[places].detach().float(), dim=1, eps=1e-12)
        of_text = (asked @ rows.T / 0.02).softmax(dim=1) / len(asked)
        of_image = (rows @ rows.T / 0.2).softmax(dim=1) / len(rows)
        return greedy_coverage(torch.cat((of_text, of_image / 2)), picks)

    return in_order(features, budget, layout, newline, order)
