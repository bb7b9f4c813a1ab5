"""Masked autoregressive decoding at toy size: the plain sampler's images, rows of their own, and what is refused."""

import pytest
import torch

from studio import MaskedAutoregressive, StudioError
from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.denoising import ReverseTransitions, TimedHead
from studio.decoding.mar import masked_autoregressive
from studio.reference.mar import textbook_masked
from tests.decoding.tiny_mar import generators, tiny_mar

MODEL = tiny_mar()
PRECISE = tiny_mar().double()
"""Its head says the same to a float32 state whatever else is in the batch."""
SETTINGS = MaskedAutoregressive(steps=5, diffusion_steps=6)


def sample(labels=(0, 1, 2), sampler=masked_autoregressive, settings=SETTINGS, model=MODEL, **options):
    seeds = [torch.Generator().manual_seed(label) for label in labels]
    condition = {"class_labels": torch.tensor(labels)}
    return sampler(model, condition, generators=seeds, settings=settings, **options)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (3.0, 0.9)])
def test_equals_the_textbook(schedule, scale, temperature):
    settings = MaskedAutoregressive(steps=5, diffusion_steps=6, guidance_schedule=schedule)
    options = {"settings": settings, "guidance_scale": scale, "temperature": temperature}
    ours, plain = sample(**options), sample(sampler=textbook_masked, **options)
    assert ours.tokens.std() > 0.1
    torch.testing.assert_close(ours.tokens, plain.tokens, atol=2e-3 * float(plain.tokens.abs().max()), rtol=0)
    assert ours.target_calls == 5 and ours.row_calls == (15 if scale == 1 else 30)
    assert set(ours.seconds) == {"transformer", "head"}


@torch.no_grad()
def test_denoising_aims_within_the_limit_of_tokens():
    """As the textbook does; several steps at once as one by one; and the last mean, the token, is where it aims."""
    limited = tiny_mar(token_limit=0.3)
    options = {"model": limited, "guidance_scale": 3.0}
    ours, plain = sample(**options).tokens, sample(sampler=textbook_masked, **options).tokens
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=0)
    assert ours.abs().max() <= 0.3 + 1e-6 < sample(guidance_scale=3.0).tokens.abs().max()
    head = TimedHead(limited.diffloss, 6)
    kernels = ReverseTransitions(head, torch.randn(2, 5, limited.config.decoder_dim), 3.0)
    states = 5 * torch.randn(6, 5, limited.config.token_dim)
    means, log_stds = kernels.along(states, 0)
    for step in range(5, -1, -1):
        mean, log_std = kernels.at(states[step], step)
        torch.testing.assert_close(means[step], mean)
        torch.testing.assert_close(log_stds[step], log_std)
    free = ReverseTransitions(TimedHead(MODEL.diffloss, 6), torch.randn(2, 5, MODEL.config.decoder_dim), 3.0)
    assert means[0].abs().max() <= 0.3 + 1e-6 < free.along(states, 0)[0][0].abs().max()


def test_a_limit_that_is_none_is_refused():
    with pytest.raises(StudioError, match="above 0"):
        tiny_mar(token_limit=0.0).diffloss.schedule(5)


def test_a_batch_equals_its_single_calls():
    together = sample(model=PRECISE, guidance_scale=2.0).tokens
    for row in range(3):
        alone = sample((row,), model=PRECISE, guidance_scale=2.0).tokens[0]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_few_prepared_steps_at_a_time_change_nothing(monkeypatch):
    whole = sample(model=PRECISE, guidance_scale=2.0).tokens
    monkeypatch.setattr("studio.decoding.denoising._PREPARED_NUMBERS", 1)
    torch.testing.assert_close(sample(model=PRECISE, guidance_scale=2.0).tokens, whole, atol=1e-4, rtol=1e-4)


def test_plan_samples_every_token_once_and_never_none():
    for total in (1, 2, 16, 64, 256):
        for steps in {1, 2, 3, 16, total // 2, total} & set(range(1, total + 1)):
            plan = MaskedAutoregressive(steps=steps).plan(total)
            assert [step.last for step in plan[1:]] == [step.first for step in plan[:-1]]
            assert (plan[0].last, plan[-1].first) == (total, 0)
            assert all(step.first < step.last for step in plan)
    counts = [step.last - step.first for step in MaskedAutoregressive(steps=16).plan(64)]
    assert counts == [1, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6]
    assert {step.last - step.first for step in MaskedAutoregressive(steps=256).plan(256)} == {1}


def test_guidance_grows_or_stays():
    linear, constant = (MaskedAutoregressive(steps=4, guidance_schedule=kind) for kind in ("linear", "constant"))
    scales = [linear.scale_at(step, 3.0) for step in linear.plan(16)]
    assert scales == sorted(scales) and scales[-1] == 1 + 2 * 15 / 16
    assert [constant.scale_at(step, 3.0) for step in constant.plan(16)] == [3.0] * 4


def test_on_step_sees_all_tokens_once_and_stops():
    seen = []

    def on_step(number, tokens, positions):
        assert (tokens.gather(1, positions[..., None].expand(-1, -1, 4)) != 0).all()
        seen.append(positions)
        return number == 2

    stopped = sample(on_step=on_step)
    known = torch.cat(seen, dim=1)
    assert len(seen) == 3 and stopped.target_calls == 3
    assert all(len(row.unique()) == len(row) for row in known)
    assert int((stopped.tokens == 0).all(dim=2).sum()) == 3 * (16 - known.shape[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"diffusion_steps": 1001}, "from 1 to 1000"),
        ({"guidance_schedule": "cosine"}, "constant, linear"),
    ],
)
def test_refused_settings(settings, words):
    with pytest.raises(StudioError, match=words):
        MaskedAutoregressive(**settings)


def test_refused_calls():
    with pytest.raises(StudioError, match="16 tokens"):
        sample(settings=MaskedAutoregressive(steps=17))
    with pytest.raises(StudioError, match="temperature"):
        sample(temperature=-1.0)


def test_noise_is_gaussian_and_its_own():
    noise, count = PositionNoise(torch.arange(500), 4), 6
    places = TokenIndex.of(torch.arange(10).expand(500, -1))
    steps = noise.steps(places, count)
    assert steps.shape == (count, 5000, 4) and torch.equal(steps, noise.steps(places, count))
    everything = torch.cat((steps, noise.start(places)[None]))
    assert abs(float(everything.mean())) < 4 / everything.numel() ** 0.5
    assert abs(float(everything.var()) - 1) < 4 * (2 / everything.numel()) ** 0.5
    columns = torch.cat((everything.flatten(2).permute(1, 0, 2).flatten(1), noise.test(places)[:, None] - 0.5), dim=1)
    correlations = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert float(correlations.abs().max()) < 5 / 5000**0.5
    uniform = noise.test(places)
    assert 0 < float(uniform.min()) and float(uniform.max()) <= 1 and abs(float(uniform.mean()) - 0.5) < 0.02
    orders = noise.order(16)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(500, -1))
    assert len(orders.unique(dim=0)) > 490


def test_each_image_takes_one_number_of_its_generator():
    first, second = generators(1)[0], generators(1)[0]
    PositionNoise.of([first], 4, "cpu")
    torch.randint(2**62, (1,), generator=second)
    assert torch.equal(first.get_state(), second.get_state())
