"""Generation then reconstruction: the sets of its order, how calls are shared out, and that random stays random."""

import pytest
import torch

from studio import ContinuousSpeculative, MaskedAutoregressive, StudioError
from studio.decoding.counter_rng import PositionNoise
from studio.decoding.cspd import continuous_speculative
from studio.decoding.gtr import gtr_counts, gtr_order, gtr_sets
from studio.decoding.mar import masked_autoregressive
from tests.decoding.tiny_mar import generators, tiny_mar

MODEL = tiny_mar().double()
LABELS = {"class_labels": torch.tensor([0, 1, 2])}


def edge_neighbours(members: torch.Tensor) -> bool:
    """Whether two of the members (side, side) bool share an edge."""
    return bool((members[1:] & members[:-1]).any() or (members[:, 1:] & members[:, :-1]).any())


def test_sets_of_the_paper():
    sets = gtr_sets(16).view(16, 16)
    members = [sets == number for number in range(3)]
    assert [int(part.sum()) for part in members] == [64, 64, 128]
    assert not any(map(edge_neighbours, members))
    raster = torch.arange(256).view(16, 16)
    assert all(edge_neighbours((raster >= first) & (raster < first + 64)) for first in (0, 64, 128, 192))


def test_sets_are_sampled_one_after_the_other_in_random_order():
    order, sets = PositionNoise(torch.arange(50), 4).order(64), gtr_sets(8)
    sorted_order = gtr_order(order, sets)
    assert torch.equal(sorted_order.sort(dim=1).values, torch.arange(64).expand(50, -1))
    sampled = sets[sorted_order.flip(1)]
    assert torch.equal(sampled, sampled.sort(dim=1).values)
    assert not torch.equal(sets[order.flip(1)], sampled)
    assert len(sorted_order[:, -16:].unique(dim=0)) == 50


def test_calls_of_the_paper_and_of_other_numbers():
    """256 tokens in 32 calls: 24 + 6 + 2; fewer or more calls never sample none and never mix two sets."""
    counts = gtr_counts(gtr_sets(16), 32)
    assert [sum(counts[:24]), sum(counts[24:30]), counts[30:]] == [64, 64, [64, 64]]
    for side in (4, 8, 16):
        sizes = torch.bincount(gtr_sets(side)).tolist()
        for steps in {3, 4, 7, side, side**2 - 1, side**2}:
            counts = gtr_counts(gtr_sets(side), steps)
            sums = torch.tensor(counts).cumsum(0).tolist()
            assert len(counts) == steps and min(counts) >= 1 and sums[-1] == side**2
            assert {sizes[0], sizes[0] + sizes[1]} <= set(sums)


def test_guidance_grows_with_what_is_known():
    plan = MaskedAutoregressive(order="gtr", steps=4).plan(16)
    assert [(step.first, step.last) for step in plan] == [(14, 16), (12, 14), (8, 12), (0, 8)]
    assert [step.progress for step in plan] == [0.125, 0.25, 0.5, 1.0]


def test_a_batch_equals_its_single_calls_and_random_is_as_before():
    settings = MaskedAutoregressive(order="gtr", steps=5, diffusion_steps=6)
    call = {"guidance_scale": 2.0, "settings": settings}
    together = masked_autoregressive(MODEL, LABELS, generators=generators(3), **call)
    for row in range(3):
        one = {"class_labels": LABELS["class_labels"][row : row + 1]}
        alone = masked_autoregressive(MODEL, one, generators=generators(1, row), **call).tokens[0]
        torch.testing.assert_close(together.tokens[row], alone, atol=1e-4, rtol=1e-4)
    plain = MaskedAutoregressive(steps=5, diffusion_steps=6)
    random = masked_autoregressive(MODEL, LABELS, generators=generators(3), guidance_scale=2.0, settings=plain).tokens
    assert not torch.allclose(together.tokens, random, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mode", ["exact", "relaxed"])
def test_works_under_continuous_speculative_decoding(mode):
    """In exact mode with the target as its draft, tokens are those of the plain loop in the same order."""
    seen = []
    settings = ContinuousSpeculative(mode=mode, order="gtr", steps=6, diffusion_steps=5)
    sampled = continuous_speculative(
        MODEL, LABELS, draft=MODEL, generators=generators(3), guidance_scale=2.0, settings=settings,
        on_step=lambda step, tokens, positions: seen.append(gtr_sets(4)[positions]) or False,
    )  # fmt: skip
    sets = torch.cat(seen, dim=1)
    if mode == "exact":
        assert torch.equal(sets, sets.sort(dim=1).values)
        plain = MaskedAutoregressive(order="gtr", steps=6, diffusion_steps=5)
        same = masked_autoregressive(MODEL, LABELS, generators=generators(3), guidance_scale=2.0, settings=plain)
        assert sampled.acceptance == 1
        torch.testing.assert_close(sampled.tokens, same.tokens, atol=1e-4, rtol=1e-4)
    assert sampled.tokens.isfinite().all() and sets.shape == (3, 16)


def test_refused():
    with pytest.raises(StudioError, match="order is one of random, gtr, not 'raster'"):
        MaskedAutoregressive(order="raster")
    with pytest.raises(StudioError, match="takes at least 3 steps"):
        MaskedAutoregressive(order="gtr", steps=2).plan(16)
    with pytest.raises(StudioError, match="16 tokens"):
        MaskedAutoregressive(order="gtr", steps=17).plan(16)
