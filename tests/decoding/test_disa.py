"""DiSA: how many denoising steps each call gets, equal bounds, and the cut of models without a limit."""

import pytest
import torch

from studio import ContinuousSpeculative, MaskedAutoregressive, StudioError
from studio.decoding.denoising import TimedHead
from studio.decoding.disa import LATEST_TIME, annealed_steps
from studio.decoding.mar import masked_autoregressive
from tests.decoding.tiny_mar import generators, tiny_mar

MODEL = tiny_mar()
LABELS = {"class_labels": torch.tensor([0, 1])}


def sample(model=MODEL, **settings):
    settings = MaskedAutoregressive(**{"steps": 5, "diffusion_steps": 8, **settings})
    return masked_autoregressive(model, LABELS, generators=generators(2), guidance_scale=2.0, settings=settings).tokens


def test_steps_of_the_paper():
    """50 to 5 in 64 calls: the sums of head steps in sequence, and for 256 tokens the evaluations of a token."""
    linear = annealed_steps("linear", 64, 50, 5)
    assert linear[:4] == [50, 49, 48, 47] and linear[-4:] == [7, 6, 5, 5] and sum(linear) == 1733
    counts = [step.last - step.first for step in MaskedAutoregressive(steps=64).plan(256)]
    evaluations = {
        kind: sum(n * t for n, t in zip(counts, annealed_steps(kind, 64, 50, 5))) / 256
        for kind in ("linear", "cosine", "two-stage")
    }
    assert evaluations == pytest.approx({"linear": 21.0, "cosine": 19.6, "two-stage": 18.2}, abs=0.05)
    assert annealed_steps("two-stage", 5, 9, 2) == [9, 9, 2, 2, 2]
    assert annealed_steps("linear", 1, 50, 5) == annealed_steps("cosine", 1, 50, 5) == [50]


@pytest.mark.parametrize("annealing", ["linear", "cosine", "two-stage"])
def test_equal_bounds_are_plain_sampling_bit_by_bit(annealing):
    plain = sample()
    assert torch.equal(sample(annealing=annealing, last_diffusion_steps=8), plain)
    annealed = sample(annealing=annealing, last_diffusion_steps=2)
    assert annealed.isfinite().all() and not torch.equal(annealed, plain)


def test_five_last_steps_unless_all_are_fewer():
    plans = [MaskedAutoregressive(steps=3, diffusion_steps=most, annealing="linear") for most in (50, 4)]
    assert [settings.denoising_plan() for settings in plans] == [[50, 27, 5], [4, 4, 4]]


def test_models_without_a_limit_denoise_from_time_950_on():
    """Of 50, 25 and 5 steps 48, 24 and 5 are left; otherwise the first step is of time 999."""
    cut = [MODEL.diffloss.schedule(steps, LATEST_TIME) for steps in (50, 25, 5)]
    assert [schedule.steps for schedule in cut] == [48, 24, 5]
    assert {int(schedule.timestep_map[-1]) for schedule in cut} == {950}
    assert int(MODEL.diffloss.schedule(50).timestep_map[-1]) == 999
    grown = [float(MODEL.diffloss.schedule(5, latest).sqrt_recip_alphas_cumprod[-1]) for latest in (LATEST_TIME, None)]
    assert grown[0] < 20 < 1000 < grown[1]


def test_a_limit_makes_the_cut_needless(monkeypatch):
    seen = []
    space = TimedHead._space
    monkeypatch.setattr(TimedHead, "_space", lambda self, *schedule: (seen.append(schedule), space(self, *schedule)))
    sample(tiny_mar(token_limit=2.0), annealing="linear", last_diffusion_steps=2)
    assert seen == [(8, None), (6, None), (5, None), (3, None), (2, None)]
    seen.clear()
    sample(annealing="two-stage", last_diffusion_steps=2)
    assert seen == [(8, 950), (2, 950)]


def test_refused():
    with pytest.raises(StudioError, match="annealing is one of none, linear, cosine, two-stage, not 'square'"):
        MaskedAutoregressive(annealing="square")
    with pytest.raises(StudioError, match="last_diffusion_steps goes with annealing"):
        MaskedAutoregressive(last_diffusion_steps=5)
    with pytest.raises(StudioError, match="at most diffusion_steps, 8, not 9"):
        sample(annealing="linear", last_diffusion_steps=9)
    with pytest.raises(StudioError, match=r"annealing \(DiSA\) cannot go with continuous speculative"):
        ContinuousSpeculative(annealing="linear")
