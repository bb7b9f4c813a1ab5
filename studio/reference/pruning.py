"""Slow reference pruners for tests and benchmarks.

Loops as the papers state them, one token at a time, with nothing carried from pick to pick. They share the budgets
of the fast path and none of its selection. Newlines are left out: every function returns content tokens alone.
"""

import torch
import torch.nn.functional as F

from studio.pruning.attention import Attention, scores_for
from studio.pruning.budget import apportion
from studio.pruning.globalcom2 import crop_ratios
from studio.pruning.layout import Layout


def diverse_order(features: torch.Tensor, picks: int) -> torch.Tensor:
    """Greedy max-min diversity of rows (M, D), arXiv:2503.02175, at O(picks^2 M): picks in order of choice."""
    rows = F.normalize(features.float(), dim=1, eps=1e-12)
    return order_from_distances(1 - rows @ rows.T, picks)


def order_from_distances(distances: torch.Tensor, picks: int) -> torch.Tensor:
    """The loop of `diverse_order` on distances (M, M): each pick looks at all chosen rows anew."""
    nearest = distances.clone().fill_diagonal_(float("inf")).topk(1, dim=0, largest=False).values[0]
    chosen = nearest.argmax().view(1)
    while len(chosen) < picks:
        nearest = torch.index_select(distances, 0, chosen).topk(1, dim=0, largest=False).values[0]
        nearest[chosen] = float("-inf")
        chosen = torch.cat((chosen, nearest.argmax().view(1)))
    return chosen


def hired(attention: Attention, layout: Layout, budget: int, alpha: float = 0.5) -> torch.Tensor:
    """HiRED, arXiv:2408.10945: `budget` places of the packed sequence, sorted."""
    height, width = layout.size
    scores = scores_for("HiRED", "last", attention, layout)
    last = {place: float(scores[p, n]) for place, p, n in _tokens(layout)}
    regions = _regions(layout)
    budgets = [budget]
    if layout.grid:
        rows, columns = layout.grid
        first = scores_for("HiRED", "first", attention, layout)[0].tolist()
        ranked = sorted(range(height * width), key=lambda n: -first[n])
        hits = [0.0] * (rows * columns)
        for token in ranked[: int(height * width * (1 - alpha))]:
            row = min(token // width // (height // rows), rows - 1)
            column = min(token % width // (width // columns), columns - 1)
            hits[row * columns + column] += 1
        caps = [len(region) for region in regions]
        crops = apportion(budget - min(int(budget * alpha), caps[0]), hits, caps[1:])
        budgets = [min(budget - sum(crops), caps[0]), *crops]
    return _best(regions, last, budgets)


def globalcom2(attention: Attention, layout: Layout, budget: int, tau: float = 10.0) -> torch.Tensor:
    """GlobalCom2, arXiv:2501.05179: `budget` places of the packed sequence, sorted."""
    logits, regions = scores_for("GlobalCom2", "logits", attention, layout), _regions(layout)
    caps = [len(region) for region in regions]
    scores = {place: float(logits[p, n]) for place, p, n in _tokens(layout)}
    ratios = [budget / sum(caps)]
    if layout.grid:
        ratios += crop_ratios(logits[0], layout.size, layout.grid, ratios[0], tau).tolist()
        crops = [place for region in regions[1:] for place in region]
        top, left = min(int(layout.row[c]) for c in crops), min(int(layout.column[c]) for c in crops)
        canvas = [max(int(x[c]) for c in crops) - low + 1 for x, low in ((layout.row, top), (layout.column, left))]
        scaled = F.interpolate(logits[:1].view(1, 1, *layout.size), size=canvas, mode="bilinear")[0, 0]
        for region in regions[1:]:
            shared = {c: float(scaled[int(layout.row[c]) - top, int(layout.column[c]) - left]) for c in region}
            own_norm = sum(scores[c] ** 2 for c in region) ** 0.5
            shared_norm = sum(value**2 for value in shared.values()) ** 0.5
            scores.update({c: scores[c] / own_norm + shared[c] / shared_norm for c in region})
    return _best(regions, scores, apportion(budget, [cap * r for cap, r in zip(caps, ratios)], caps))


def _tokens(layout: Layout):
    places = layout.content.tolist()
    return [(place, int(layout.partition[place]), int(layout.token[place])) for place in places]


def _regions(layout: Layout) -> list[list[int]]:
    regions: list[list[int]] = [[] for _ in range(layout.partitions)]
    for place, partition, _ in _tokens(layout):
        regions[partition].append(place)
    return regions


def _best(regions, scores, budgets) -> torch.Tensor:
    kept = []
    for region, budget in zip(regions, budgets):
        kept += sorted(region, key=lambda place: -scores[place])[:budget]
    return torch.tensor(sorted(kept))
