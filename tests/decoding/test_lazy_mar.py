"""LazyMAR: which calls are full, that those are plain bit by bit, and how far the others may be off."""

import pytest
import torch

from studio import ContinuousSpeculative, MaskedAutoregressive, StudioError
from studio.decoding import lazy_mar
from studio.decoding.autoregressive import condition_rows
from studio.decoding.lazy_mar import LazyMAR, full_calls, kept_share
from studio.decoding.mar import masked_autoregressive
from studio.decoding.sampling import KnownTokens
from tests.decoding.tiny_mar import generators, tiny_mar

MODEL = tiny_mar(grid_size=8, depth=4)
PRECISE = tiny_mar(grid_size=8, depth=4).double()
"""The places that go on are chosen in the second of four blocks."""
LABELS = {"class_labels": torch.tensor([0, 1])}
LAZY = {"cache": "lazy", "refresh_every": 4, "warm_steps": 0}


def sample(model=MODEL, labels=(0, 1), first=0, scale=2.0, on_step=None, known=None, **settings):
    settings = MaskedAutoregressive(**{"steps": 16, "diffusion_steps": 5, **settings})
    return masked_autoregressive(
        model, {"class_labels": torch.tensor(labels)}, generators=generators(len(labels), first),
        guidance_scale=scale, settings=settings, on_step=on_step, known=known,
    )  # fmt: skip


def started(model, every, warm=0):
    """A `LazyMAR` of two guided images before its first call, and their order."""
    plan = MaskedAutoregressive(steps=16).plan(64)
    buffer, _ = condition_rows(model, LABELS, guided=True)
    order = torch.stack([torch.randperm(64, generator=generator) for generator in generators(2)])
    return LazyMAR(model, buffer, order, plan, every, warm), order


def after_first_call(model):
    lazy, order = started(model, every=16)
    lazy.conditions(torch.ones(2, 64, 4, dtype=torch.float64))
    return lazy, order


@torch.no_grad()
def errors(every, without_difference=False):
    """Relative errors of both streams' conditions, of each call along random tokens; and which calls were full."""
    lazy, order = started(PRECISE, every)
    tokens = torch.randn(2, 64, 4, generator=generators(1)[0], dtype=torch.float64)
    found, model, buffer = [], PRECISE, lazy.buffer
    for step in lazy.plan:
        if without_difference and hasattr(lazy, "difference"):
            lazy.difference.zero_()
        exact = model.conditions(tokens, order[:, step.last :], order[:, step.first : step.last], buffer)
        ours = lazy.conditions(tokens)
        found.append((ours - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1))
    return torch.stack(found), torch.tensor(lazy.full)


def test_full_calls_of_the_authors():
    plan = MaskedAutoregressive(steps=64).plan(256)
    full = full_calls(plan, 256, every=9, warm=5)
    assert [number for number, is_full in enumerate(full) if is_full] == [0, 1, 2, 3, 4, 5, 14, 23, 32, 41, 50, 59]
    assert all(full_calls(plan, 256, every=1, warm=1))
    wide = MaskedAutoregressive(steps=4).plan(64)
    assert full_calls(wide, 64, every=9, warm=0) == [True, True, True, True], "each but the first samples 18 or more"
    assert [kept_share(number, 64) for number in (19, 20, 24, 30, 39, 40, 63)] == [1, 0.6, 0.5, 0.15, 0.12, 0.05, 0.05]
    assert kept_share(5, 16) == 0.6 and kept_share(15, 16) == 0.05


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_refresh_at_every_step_is_plain_sampling_bit_by_bit(scale):
    plain = sample(scale=scale)
    for always in ({"refresh_every": 1}, {"warm_steps": 16}):
        full = sample(scale=scale, cache="lazy", **always)
        assert torch.equal(full.tokens, plain.tokens) and full.row_calls == plain.row_calls
    lazy = sample(scale=scale, **LAZY)
    assert lazy.tokens.isfinite().all() and not torch.equal(lazy.tokens, plain.tokens)
    assert lazy.target_calls == 16 and (lazy.row_calls < plain.row_calls) == (scale != 1)


def test_full_calls_are_plain_bit_by_bit_and_others_are_not():
    found, full = errors(every=4)
    assert full.tolist() == [number % 4 == 0 for number in range(16)]
    assert found[full].eq(0).all() and found[~full].amax(dim=1).gt(1e-4).all()


def test_errors_fall_with_the_period():
    means = [float(errors(every)[0].mean()) for every in (100, 8, 4, 2)]
    assert means == sorted(means, reverse=True) and means[-1] < 0.01 < 0.02 < means[0]


@torch.no_grad()
def test_a_decoder_that_keeps_all_places_is_exact(monkeypatch):
    """From exact inputs, whatever keys and values are kept; with few places kept it is not."""
    lazy, order = after_first_call(PRECISE)
    step, conditional = lazy.plan[1], lazy.buffer[:2]
    visible, wanted = order[:, step.last :], order[:, step.first : step.last]
    states = PRECISE.encode(torch.ones(2, 64, 4, dtype=torch.float64), visible, conditional)
    x = PRECISE.decoder_input(states, visible)
    exact = PRECISE.decode(states, visible, wanted)
    found = {}
    for share in (1.0, 0.1):
        monkeypatch.setattr(lazy_mar, "kept_share", lambda number, count, share=share: share)
        decoded = lazy._decode(x, lazy.before + wanted, lazy.before + visible)
        found[share] = float((PRECISE.head_conditions(decoded, wanted) - exact).norm() / exact.norm())
        lazy, _ = after_first_call(PRECISE)
    assert found[1.0] < 1e-12 and found[0.1] > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_new_tokens_read_all_known_ones(depth):
    """The keys of a first block depend on nothing else, so an encoder of one block gives new tokens exact states."""
    model = tiny_mar(grid_size=8, depth=depth).double()
    lazy, order = after_first_call(model)
    tokens = torch.ones(2, 64, 4, dtype=torch.float64)
    for number in (1, 2):
        known, new = (order[:, lazy.plan[number].last :], lazy._sampled_in(lazy.plan[number - 1]))
        exact = model.encode(tokens, known, lazy.buffer[:2])[:, : lazy.before + new.shape[1]]
        x = model.encoder_input(tokens, new, lazy.buffer[:2])
        for index, block in enumerate(model.encoder_blocks):
            x = lazy._appended(block, x, index)
        error = float((model.encoder_norm(x) - exact).norm() / exact.norm())
        assert error < 1e-12 if depth == 1 or number == 1 else error > 1e-4


def test_the_difference_stands_for_the_unconditional_stream():
    """It comes nearer than the conditional stream in its place."""
    (found, full), (conditional, _) = errors(every=4), errors(every=4, without_difference=True)
    assert found[~full][:, 1].mean() < 0.5 * conditional[~full][:, 1].mean()


@pytest.mark.parametrize("settings", [LAZY, {**LAZY, "order": "gtr", "annealing": "linear", "last_diffusion_steps": 2}])
def test_a_batch_equals_its_single_calls(settings):
    together = sample(PRECISE, **settings).tokens
    for row in range(2):
        alone = sample(PRECISE, labels=(row,), first=row, **settings).tokens[0]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_an_edit_of_known_tokens_is_seen_by_the_next_call(monkeypatch, inference_mode):
    """The call after it is a full one; without an edit, or one that is overlooked, it is not."""

    def edit(number, tokens, positions):
        if number == 5:
            tokens[:, positions[0, 0]] = 1.0

    def full_after(on_step):
        made = []
        kept = lazy_mar.LazyMAR.conditions
        monkeypatch.setattr(
            lazy_mar.LazyMAR, "conditions", lambda self, x: (made.append(self.next_rows), kept(self, x))[1]
        )
        with torch.inference_mode(inference_mode):
            sample(on_step=on_step, **LAZY)
        monkeypatch.undo()
        return [number for number, rows in enumerate(made) if rows == 4]

    assert full_after(edit) == [0, 4, 6, 8, 12]
    assert full_after(lambda *_: None) == [0, 4, 8, 12]


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_decoders_of_any_depth(depth):
    model = tiny_mar(grid_size=4, depth=depth)
    settings = {"steps": 8, **LAZY, "refresh_every": 3}
    assert sample(model, **settings).tokens.isfinite().all()


def test_refused():
    with pytest.raises(StudioError, match="cache is one of none, lazy, not 'all'"):
        MaskedAutoregressive(cache="all")
    for name, least in (("refresh_every", 1), ("warm_steps", 0)):
        with pytest.raises(StudioError, match=f'{name} goes with cache="lazy"'):
            MaskedAutoregressive(**{name: 2})
        with pytest.raises(StudioError, match=f"{name} must be a whole number of at least {least}"):
            MaskedAutoregressive(cache="lazy", **{name: least - 1})
    with pytest.raises(StudioError, match=r"the cache \(LazyMAR\) cannot go with continuous speculative"):
        ContinuousSpeculative(cache="lazy")


def test_known_tokens_leave_the_last_steps():
    """All three options sample what is not known, in the last steps; full calls alone are plain bit by bit."""
    tokens, mask = torch.full((2, 64, 4), 0.25), torch.zeros(2, 64, dtype=torch.bool)
    mask[:, 5:45] = True
    known = KnownTokens(tokens, mask)
    together = {**LAZY, "order": "gtr", "annealing": "linear", "last_diffusion_steps": 2}
    plain = sample(known=known).tokens
    assert torch.equal(sample(known=known, cache="lazy", refresh_every=1).tokens, plain)
    for settings in (LAZY, together):
        edited = sample(known=known, **settings)
        assert edited.tokens[mask].eq(0.25).all() and edited.tokens[~mask].ne(0).all() and edited.target_calls < 16
        assert not torch.equal(edited.tokens, plain)
