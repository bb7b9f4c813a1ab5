"""Coverage: the tokens to which all others are nearest, by greedy maximisation of a submodular function.

The second factor of SCOPE (arXiv:2510.24214) alone, from features and nothing else:

    gain(u) = sum_v max(0, cos(v, u) - best_v),    best_v = max over chosen c of cos(v, c), at first 0

Each pick has the largest gain; the chosen set is within 1 - 1/e of the best of its size.
"""

import torch
import torch.nn.functional as F


def coverage_order(features: torch.Tensor, picks: int) -> torch.Tensor:
    """`picks` different rows of features (N, D), in the order they are chosen; of equal gains the first row wins."""
    rows = F.normalize(features.detach().float(), dim=1, eps=1e-12)
    likeness = rows @ rows.T
    best, order = likeness.new_zeros(len(rows)), []
    chosen = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for _ in range(min(picks, len(rows))):
        gains = (likeness - best[:, None]).clamp(min=0).sum(dim=0).masked_fill(chosen, -1)
        pick = gains.argmax(keepdim=True)
        chosen[pick] = True
        order.append(pick)
        best = torch.maximum(best, likeness[:, pick[0]])
    return torch.cat(order)
