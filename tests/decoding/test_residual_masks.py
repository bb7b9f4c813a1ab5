"""Hiding and showing levels: numbers, distributions, and the order of depth."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from studio import StudioError
from studio.decoding.residual_masks import SCHEDULES, hidden_after_calls, hidden_slots, hide, reveal, shown

sizes = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 5), st.integers(0, 1000))


def noise_of(rows, positions, depth, seed):
    return torch.rand(rows, positions, depth, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_all_to_none(schedule):
    for slots in (1, 64, 1024):
        counts = hidden_slots(torch.linspace(0, 1, 33), slots, schedule)
        assert counts[0] == slots and counts[-1] == 0
        assert (counts.diff() <= 0).all()
        assert (counts[:-1] >= 1).all()
    half = {"cosine": math.cos(math.pi / 4), "circle": 0.75**0.5, "arccos": 2 / 3}
    assert hidden_slots(0.5, 1000, schedule) == math.ceil(round(1000 * half[schedule], 6))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("slots", [1, 5, 64])
def test_every_call_shows_something(schedule, slots):
    for calls in range(1, slots + 1):
        left = hidden_after_calls(calls, slots, schedule)
        assert len(left) == calls and left[-1] == 0
        assert all(before > after for before, after in zip([slots, *left], left))
    assert hidden_after_calls(slots, slots, schedule) == list(range(slots))[::-1]
    with pytest.raises(StudioError, match=f"{slots} codes"):
        hidden_after_calls(slots + 1, slots, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_calls_follow_the_schedule_where_it_moves(schedule):
    assert hidden_after_calls(4, 1000, schedule) == [int(hidden_slots(t / 4, 1000, schedule)) for t in (1, 2, 3, 4)]


def test_refuses_other_schedules():
    with pytest.raises(StudioError, match="cosine, circle, arccos"):
        hidden_slots(0.5, 10, "linear")


@given(sizes, st.data())
@settings(deadline=None, max_examples=40)
def test_hidden_levels_add_up(case, data):
    rows, positions, depth, seed = case
    counts = data.draw(st.lists(st.integers(0, positions * depth), min_size=rows, max_size=rows))
    hidden = hide(noise_of(*case), torch.tensor(counts))
    assert hidden.shape == (rows, positions) and hidden.sum(dim=1).tolist() == counts
    assert hidden.min() >= 0 and hidden.max() <= depth
    more = hide(noise_of(*case), torch.tensor(counts) + 1)
    assert (more >= hidden).all()
    visible = shown(hidden, depth)
    assert torch.equal(visible.sum(dim=-1), depth - hidden)
    assert (visible[..., 1:] <= visible[..., :-1]).all()


def test_the_distribution_is_multivariate_hypergeometric():
    positions, depth, count, samples = 3, 2, 3, 20000
    noise = torch.rand(samples, positions, depth, generator=torch.Generator().manual_seed(0))
    hidden = hide(noise, torch.full((samples,), count))
    torch.testing.assert_close(
        hidden.double().mean(dim=0), torch.full((3,), count / positions).double(), atol=0.03, rtol=0
    )
    for numbers in product(range(depth + 1), repeat=positions):
        if sum(numbers) == count:
            expected = math.prod(math.comb(depth, n) for n in numbers) / math.comb(positions * depth, count)
            share = (hidden == torch.tensor(numbers)).all(dim=1).double().mean()
            assert abs(float(share) - expected) < 0.02, numbers


@given(sizes, st.data())
@settings(deadline=None, max_examples=40)
def test_showing_keeps_what_was_shown(case, data):
    rows, positions, depth, seed = case
    before = data.draw(st.integers(0, positions * depth))
    left = data.draw(st.integers(0, before))
    hidden = hide(noise_of(*case), torch.full((rows,), before))
    after = reveal(hidden, noise_of(rows, positions, depth, seed + 1), left)
    assert (after.sum(dim=1) == left).all()
    assert (after <= hidden).all() and (after >= 0).all()


def test_confident_cells_come_first():
    hidden = torch.tensor([[2, 1, 3]])
    confidence = torch.tensor([[0.0, 2.0, 1.0]])[..., None].expand(1, 3, 3)
    assert reveal(hidden, confidence, 5).tolist() == [[2, 0, 3]]
    assert reveal(hidden, confidence, 4).tolist() == [[2, 0, 2]]
    assert reveal(hidden, confidence, 2).tolist() == [[2, 0, 0]]
    assert reveal(hidden, confidence, 0).tolist() == [[0, 0, 0]]
