"""TokenBridge's decoding at toy size: beside a plain loop without a cache, rows of their own, and what is refused."""

import pytest
import torch

from studio import DimensionWise, StudioError
from studio.decoding.sampling import Sampling, exponential_noise
from studio.decoding.token_bridge import Cells, dimension_wise, sample_cells
from tests.decoding.tiny_token_bridge import tiny_token_bridge as tiny

MODEL, VALUES = tiny(), torch.linspace(-2, 2, 5)
FOUR_STEPS = DimensionWise(steps=4)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(labels=(0, 2, 1), model=MODEL, seeds=None, settings=FOUR_STEPS, **options):
    condition = {"class_labels": torch.tensor(labels)}
    return dimension_wise(
        model, VALUES, condition, generators=generators(*(seeds or labels)), settings=settings, **options
    )


@torch.no_grad()
def plainly(label, seed, scale, settings, sampling):
    """One image: all positions at each step, all dimensions at each place, no cache."""
    [generator], model = generators(seed), MODEL
    order = torch.randperm(9, generator=generator)
    tokens, known = torch.full((9, 4), -1), set()
    for step in settings.plan(9):
        visible = torch.tensor(sorted(known), dtype=torch.int64)[None]
        both = []
        for drop in (False, True):
            buffer, _ = model.embed_condition(class_labels=torch.tensor([label]), drop=torch.tensor([drop]))
            both.append(model.decode(model.encode(VALUES[tokens][None], visible, buffer), visible)[0])
        states = both[1] + settings.scale_at(step, scale) * (both[0] - both[1])
        cells = order[step.first : step.last].tolist()
        for place, dimension in enumerate((2, 0, 3, 1)):
            noise = exponential_noise(1, 5 * len(cells), [generator], "cpu").view(-1, 5)
            for cell, race in zip(cells, noise):
                ordered = tokens[cell, [2, 0, 3, 1]].clamp_min(0)
                logits = model.head(states[cell][None], ordered[None], first_step=True)[0, place]
                distribution = sampling.probabilities(logits[None])[0]
                tokens[cell, dimension] = (distribution / race).argmax()
        known |= set(cells)
    return tokens


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_a_plain_loop(schedule, scale):
    settings, sampling = DimensionWise(steps=4, guidance_schedule=schedule), Sampling(temperature=0.8, top_k=4)
    sampled = sample(guidance_scale=scale, settings=settings, sampling=sampling)
    assert sampled.tokens.min() >= 0 and sampled.target_calls == 4 and sampled.row_calls == (12 if scale == 1 else 24)
    for tokens, label in zip(sampled.tokens, (0, 2, 1)):
        assert torch.equal(tokens, plainly(label, label, scale, settings, sampling))


def test_a_batch_equals_its_single_calls():
    together = sample(guidance_scale=2.0).tokens
    for row, label in enumerate((0, 2, 1)):
        assert torch.equal(sample((label,), guidance_scale=2.0).tokens[0], together[row])
    assert not torch.equal(sample((0, 0), seeds=(3, 4)).tokens[0], sample((0, 0), seeds=(3, 4)).tokens[1])


@torch.no_grad()
def test_levels_follow_the_distributions_of_the_head():
    """20,000 cells of one state (seed 0): shares of pairs of levels within 5 standard errors; another distribution's
    are not."""
    count, states = 20_000, torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(0))
    sampled = sample_cells(MODEL, [Cells(states.expand(-1, count, -1), Sampling(), generators(0))])[0][0]
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    contexts = torch.nn.functional.pad(pairs, (0, 2))
    log_distributions = MODEL.head(states[0].expand(25, -1), contexts, first_step=True).log_softmax(dim=-1)
    expected = log_distributions[:, :2].gather(2, pairs[..., None]).sum(dim=(1, 2)).exp()
    shares = (sampled[:, 0] * 5 + sampled[:, 1]).bincount(minlength=25) / count
    errors = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() < 5 * errors + 1e-4).all()
    assert ((shares - expected.roll(1)).abs() > 5 * errors + 1e-4).any()


def test_order_guidance_and_the_flag():
    fixed = torch.arange(9).expand(3, -1)
    seen = []
    sample(order=fixed, on_step=lambda number, tokens: seen.append((tokens >= 0).all(dim=2)))
    assert [int(known.sum(dim=1)[0]) for known in seen] == [9 - step.first for step in FOUR_STEPS.plan(9)]
    assert all(torch.equal(known, known.sort(dim=1).values) for known in seen)
    greedy = {"sampling": Sampling(temperature=0), "order": fixed}
    assert torch.equal(sample(**greedy).tokens, sample(**greedy, seeds=(7, 8, 9)).tokens)
    assert not torch.equal(sample(**greedy, guidance_scale=8.0).tokens, sample(**greedy).tokens)
    consistent = tiny(sampling_first_input_adds_step_embedding=False)
    assert not torch.equal(sample(**greedy, model=consistent).tokens, sample(**greedy).tokens)


def test_on_step_stops_and_may_write():
    def on_step(number, tokens):
        tokens[0, tokens[0, :, 0] >= 0] = 3
        return number == 1

    stopped = sample(on_step=on_step)
    assert stopped.target_calls == 2 and (stopped.tokens[0] == 3).any()
    assert bool((stopped.tokens < 0).any())


def test_refused():
    with pytest.raises(StudioError, match="9 tokens"):
        sample(settings=DimensionWise(steps=10))
    with pytest.raises(StudioError, match="steps"):
        DimensionWise(steps=0)
    with pytest.raises(StudioError, match="constant, linear"):
        DimensionWise(guidance_schedule="cosine")
