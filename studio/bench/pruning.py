"""How long it takes to choose tokens, for every pruning method, beside the plain textbook."""

from collections.abc import Callable

import torch

from studio import backends
from studio.bench.models import check_counts
from studio.checkpoints.loading import pick_device
from studio.checks import check_integer
from studio.errors import StudioError
from studio.pruning.attention import Attention
from studio.pruning.divprune import order_from_similarities, similarities
from studio.pruning.layout import Layout
from studio.pruning.registry import METHODS, READS_TEXT, method_named
from studio.reference import pruning as textbook

MAX_TOKENS, MAX_WIDTH = 1 << 15, 1 << 16
SIZES = ((576, 58), (2880, 288))
_SIDE, _WORDS = 24, 20


def bench_pruning(
    *,
    methods: list[str] | tuple[str, ...] = tuple(METHODS),
    sizes: list[tuple[int, int]] | tuple[tuple[int, int], ...] = SIZES,
    width: int = 4096,
    device: str | torch.device = "cpu",
    repeats: int = 3,
    seed: int = 0,
) -> dict:
    """Time the selection of every method on random features.

    Args:
        methods: names out of `METHODS`.
        sizes: pairs (tokens, kept); tokens is a multiple of 576: one partition, or a thumbnail and a column of crops
            (2880 is a thumbnail and 2 x 2 crops), with no newlines.
        width: D of the features.
        device: where the features are; the textbook runs there too.
        repeats: runs of each side; the fastest counts. The threads are those torch is set to.
        seed: of the features and the attention.

    Returns:
        `{"rows": [{"method", "tokens", "kept", "threads", "seconds", "textbook_seconds", "speedup", "identical"}]}`;
        divprune has also `loop_seconds`, `textbook_loop_seconds` and `loop_speedup`: the picks alone, similarities
        given. Only divprune, hired and globalcom2 have a textbook; for others its columns are `None`.

    Raises:
        StudioError: an unknown method, for sizes that do not fit, or a device that is not there.
    """
    for name in methods:
        method_named(name)
    check_counts(repeats=repeats)
    width = check_integer("width", width, 1, MAX_WIDTH)
    rows, device = [], pick_device(device)
    for tokens, kept in sizes:
        layout = _layout(tokens, kept)
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(tokens, width, generator=generator).to(device)
        scores = torch.randn(3, layout.partitions, _SIDE**2, generator=generator)
        attention = Attention(first=scores[0].softmax(-1), last=scores[1].softmax(-1), logits=scores[2])
        rows += [_row(name, features, kept, attention, layout, repeats) for name in methods]
    return {"rows": rows}


def _layout(tokens: int, kept: int) -> Layout:
    kept = check_integer("The number of kept tokens", kept, 0, MAX_TOKENS)
    crops, rest = divmod(check_integer("The number of tokens", tokens, 1, MAX_TOKENS), _SIDE**2)
    if rest or crops < 1 or not 0 < kept < tokens:
        raise StudioError(f"Give sizes as (a multiple of {_SIDE**2}, fewer to keep), not {(tokens, kept)}.")
    if crops == 1:
        return Layout.plain(_SIDE, _SIDE)
    grid = (2, 2) if crops == 5 else (crops - 1, 1)
    return Layout.anyres(_SIDE, grid, grid, newlines=False)


def _row(name, features, kept, attention, layout, repeats) -> dict:
    given: dict = {"attention": attention, "layout": layout}
    if name in READS_TEXT:
        given["text"] = features[:_WORDS]

    def select():
        return METHODS[name](features, kept, generator=torch.Generator().manual_seed(0), **given)

    plain = {
        "divprune": lambda: textbook.diverse_order(features, kept).sort().values,
        "hired": lambda: textbook.hired(attention, layout, kept),
        "globalcom2": lambda: textbook.globalcom2(attention, layout, kept),
    }.get(name)
    seconds, chosen = _fastest(select, repeats, features.device)
    slow, expected = _fastest(plain, repeats, features.device) if plain else (None, None)
    row = {
        "method": name,
        "tokens": len(features),
        "kept": kept,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "textbook_seconds": slow,
        "speedup": slow / seconds if slow else None,
        "identical": torch.equal(chosen.cpu(), expected.cpu()) if expected is not None else None,
    }
    if name == "divprune":
        matrix = similarities(torch.nn.functional.normalize(features.float(), dim=1))
        distances = 1 - matrix
        loop, _ = _fastest(lambda: order_from_similarities(matrix, kept), repeats, features.device)
        plain_loop, _ = _fastest(lambda: textbook.order_from_distances(distances, kept), repeats, features.device)
        row |= {"loop_seconds": loop, "textbook_loop_seconds": plain_loop, "loop_speedup": plain_loop / loop}
    return row


def _fastest(run: Callable, repeats: int, device: torch.device) -> tuple[float, torch.Tensor]:
    return min((backends.timed(run, device) for _ in range(repeats)), key=lambda timed: timed[0])
