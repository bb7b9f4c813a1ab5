"""Reverse steps in C against those in torch: same numbers for any number of tokens, and a way without a compiler."""

import pytest
import torch

from studio import backends
from studio.backends import cpu_c_head
from studio.backends.cpu_c_head import NativeHead
from studio.decoding.denoising import ReverseTransitions, TimedHead
from studio.models.diffusion_head import DiffusionLoss

SMALL = {"token_dim": 4, "condition_dim": 8, "width": 24, "depth": 1}
DEEP = {"token_dim": 16, "condition_dim": 20, "width": 40, "depth": 3, "limit": 2.0}
STEPS = 7


def head_of(sizes, halves=False):
    torch.manual_seed(0)
    head = DiffusionLoss(**sizes)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return head.bfloat16().float() if halves else head


def kernels_of(head, conditions, scale, native):
    timed = TimedHead(head, STEPS)
    assert isinstance(timed.native, NativeHead)
    if not native:
        timed.native = None
    return ReverseTransitions(timed, conditions, scale)


def assert_same(ours, expected, table):
    """Up to rounding, which the noisiest steps multiply by what they remove of the noise."""
    removed = table[:, 1:2].amax().clamp(min=1).item()
    for one, other, grown in zip(ours, expected, (removed, 1), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * grown, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 24, 49, 70])
@pytest.mark.parametrize("copies", [1, 2], ids=["plain", "guided"])
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [SMALL, DEEP], ids=["free", "limited"])
def test_every_step_equals_torchs(sizes, halves, copies, tokens):
    head = head_of(sizes, halves)
    conditions, scale = torch.randn(copies, tokens, sizes["condition_dim"]), torch.rand(tokens, 1) * 3
    ours, expected = (kernels_of(head, conditions, scale, native) for native in (True, False))
    assert ours.head.native._head.bf16 == halves
    table = ours.head.table
    states = torch.randn(STEPS, tokens, sizes["token_dim"])
    for step in reversed(range(STEPS)):
        first = states[step, : max(1, tokens - step)]
        assert_same(ours.at(first, step), expected.at(first, step), table[step : step + 1])
    assert_same(ours.along(states[2:], 2), expected.along(states[2:], 2), table[2:])
    some = torch.arange(tokens) % 3 == 0
    for step in (STEPS - 1, STEPS - 2):  # from what was prepared for all
        ours.first = expected.first = STEPS
        ours.at(states[-1], STEPS - 1), expected.at(states[-1], STEPS - 1)
        found, wanted = (kernels.take(some).at(states[step, some], step) for kernels in (ours, expected))
        assert_same(found, wanted, table[step : step + 1])
    assert_same(ours.take(some).along(states[:, some], 0), expected.take(some).along(states[:, some], 0), table)


@torch.no_grad()
def test_the_path_in_one_call_changes_no_bit():
    head, tokens = head_of(DEEP), 19
    kernels = kernels_of(head, torch.randn(2, tokens, DEEP["condition_dim"]), 3.0, native=True)
    states = torch.randn(STEPS, tokens, DEEP["token_dim"])
    means, log_stds = kernels.along(states, 0)
    kernels.first = STEPS
    for step in reversed(range(STEPS)):
        mean, log_std = kernels.at(states[step, :3], step)
        assert torch.equal(mean, means[step, :3]) and torch.equal(log_std, log_stds[step, :3])


@torch.no_grad()
def test_numbers_of_double_precision_stay_so():
    kernels = ReverseTransitions(
        TimedHead(head_of(SMALL).double(), STEPS), torch.randn(1, 2, 8, dtype=torch.float64), 1.0
    )
    mean, _ = kernels.at(torch.randn(2, 4, dtype=torch.float64), STEPS - 1)
    assert mean.dtype == torch.float64


def test_where_it_does_not_run_torch_does(monkeypatch):
    assert TimedHead(head_of({**SMALL, "token_dim": 5}), STEPS).native is None
    assert TimedHead(head_of({**SMALL, "width": 20}), STEPS).native is None
    assert TimedHead(head_of(SMALL).bfloat16(), STEPS).native is None
    monkeypatch.setattr(backends, "_LARGEST_COPY_BYTES", 1)
    assert TimedHead(head_of(SMALL), STEPS).native is None
    monkeypatch.undo()
    monkeypatch.setattr(cpu_c_head, "library", lambda: None)
    assert TimedHead(head_of(SMALL), STEPS).native is None


def test_changed_weights_are_read_anew():
    head = head_of(SMALL)
    before = TimedHead(head, STEPS).native
    assert TimedHead(head, STEPS).native is before
    head.net.input_proj.weight.data[0, 0] += 1
    assert TimedHead(head, STEPS).native is not before
