"""The noise-to-token map: exact where an exact answer is known, of the right distribution, invariant as the flow is."""

import math

import pytest
import torch

from studio import StudioError
from studio.decoding.noise_map import Flow, NoiseMap, codebook_scales, euler, noise_to_token

NORMAL = torch.distributions.Normal(0.0, 1.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(vocab, width, rows, seed=0, sharpness=1.5):
    """Codes, one distribution per row, and noise."""
    probs = (sharpness * random(rows, vocab, seed=seed + 1)).softmax(dim=-1)
    return random(vocab, width, seed=seed), probs, random(rows, width, seed=seed + 2)


def chi_square(tokens, probs):
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    kept = probs > 0
    assert counts[~kept].sum() == 0
    expected = probs[kept] * len(tokens)
    return float(((counts[kept] - expected) ** 2 / expected).sum()), int(kept.sum()) - 1


def critical(degrees):
    """What chi-square exceeds once in ten thousand times (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(("vocab", "width"), [(16, 3), (64, 8)])
def test_distribution(vocab, width):
    codebook = random(vocab, width).float()
    probs = random(vocab, seed=1).softmax(dim=-1)
    probs[: vocab // 4] = 0
    probs[-1] = 1e-3
    probs[:-1] *= (1 - 1e-3) / probs[:-1].sum()
    noise = random(20000, width, seed=2).float()

    def distance(steps, **settings):
        return chi_square(noise_to_token(noise, probs.float().expand(20000, -1), codebook, steps, **settings), probs)

    value, degrees = distance(24)
    assert value < critical(degrees)
    for steps in (4, 10):
        assert distance(steps, method="euler")[0] > critical(degrees), "the test would not notice a coarse solver"


@pytest.mark.parametrize(
    ("steps", "margin", "method"), [(24, 0.02, "multistep"), (64, 5e-3, "multistep"), (400, 1e-4, "rk4")]
)
def test_a_line_of_codes_is_cut_at_the_quantiles(steps, margin, method):
    codebook, probs = random(7, 1), random(7, seed=1).softmax(dim=-1)
    noise = random(500, 1, seed=2)
    order = codebook[:, 0].argsort()
    cuts = NORMAL.icdf(probs[order].cumsum(dim=0)[:-1])
    expected = order[torch.searchsorted(cuts, noise[:, 0].contiguous())]
    clear = (noise - cuts).abs().amin(dim=-1) > margin
    tokens = noise_to_token(noise, probs.expand(500, -1), codebook, steps, method=method)
    assert torch.equal(tokens[clear], expected[clear])


@pytest.mark.parametrize(("steps", "margin", "method"), [(24, 0.02, "multistep"), (400, 1e-4, "rk4")])
def test_two_codes_share_a_half_space(steps, margin, method):
    codebook, probs, noise = random(2, 5), torch.tensor([0.3, 0.7]).double(), random(500, 5, seed=1)
    side = noise @ torch.nn.functional.normalize(codebook[1] - codebook[0], dim=0) - NORMAL.icdf(probs[0])
    clear = side.abs() > margin
    tokens = noise_to_token(noise, probs.expand(500, -1), codebook, steps, method=method)
    assert torch.equal(tokens[clear], (side > 0).long()[clear])


def test_agrees_with_the_reference():
    codebook, probs, noise = case(256, 8, 300)
    exact = noise_to_token(noise, probs, codebook, 300, method="rk4")

    def wrong(steps, **settings):
        tokens = noise_to_token(noise.float(), probs.float(), codebook.float(), steps, **settings)
        return float((tokens != exact).float().mean())

    assert wrong(24) <= 0.02
    assert wrong(64) <= 0.01
    assert wrong(24) < wrong(24, method="euler")


def test_invariances():
    codebook, probs, noise = case(24, 4, 200)
    turn = torch.linalg.qr(random(4, 4, seed=9))[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for settings, allowed in (({}, 0.01), ({"steps": 300, "method": "rk4"}, 0)):

        def tokens(noise, probs, codebook, settings=settings):
            return noise_to_token(noise, probs, codebook, **settings)

        plain = tokens(noise, probs, codebook)
        changed = {
            "shifted": tokens(noise, probs, codebook + random(4, seed=5)),
            "scaled": tokens(noise, probs, 7 * codebook),
            "turned": tokens(noise @ turn, probs, codebook @ turn),
            "permuted": order[tokens(noise, probs[:, order], codebook[order])],
            "with impossible codes": tokens(
                noise, torch.cat((probs, torch.zeros(200, 5)), dim=1), torch.cat((codebook, random(5, 4, seed=6)))
            ),
            "with a split code": tokens(
                noise,
                torch.cat((probs[:, :-1], probs[:, -1:] / 2, probs[:, -1:] / 2), dim=1),
                torch.cat((codebook, codebook[-1:])),
            ).clamp(max=23),
        }
        for name, found in changed.items():
            assert float((found != plain).double().mean()) <= allowed, name


def test_near_duplicates_are_told_apart_by_the_flow():
    pairs = random(8, 1)
    codebook = torch.cat((pairs, pairs + 1e-5))
    probs, noise = torch.full((16,), 1 / 16).double(), random(400, 1, seed=3)
    order = codebook[:, 0].argsort()
    cuts = NORMAL.icdf(probs[order].cumsum(dim=0)[:-1])
    expected = order[torch.searchsorted(cuts, noise[:, 0].contiguous())]
    clear = (noise - cuts).abs().amin(dim=-1) > 0.02
    tokens = noise_to_token(noise.float(), probs.float().expand(400, -1), codebook.float(), sigma_min=0.1)
    assert torch.equal(tokens[clear], expected[clear])


def test_only_possible_tokens_come_out():
    codebook, probs, noise = case(32, 4, 64)
    probs[torch.arange(64), torch.arange(64) % 32] = 0
    probs /= probs.sum(dim=-1, keepdim=True)
    for method in ("multistep", "euler"):
        tokens = noise_to_token(noise, probs, codebook, 4, method=method)
        assert (probs.gather(1, tokens[:, None]) > 0).all()
        assert torch.equal(noise_to_token(noise, 3 * probs, codebook, 4, method=method), tokens)
        chosen = torch.nn.functional.one_hot(torch.arange(64) % 32, 32).double()
        assert torch.equal(noise_to_token(noise, chosen, codebook, 4, method=method), torch.arange(64) % 32)


def test_a_row_does_not_depend_on_the_others_or_on_the_block():
    codebook, probs, noise = (part.float() for part in case(60, 4, 50))
    mapped = NoiseMap(codebook)
    together = mapped(noise, probs)
    assert torch.equal(together, mapped(noise, probs))
    assert torch.equal(together, torch.cat([mapped(noise[i : i + 1], probs[i : i + 1]) for i in range(50)]))
    assert torch.equal(together.flip(0), mapped(noise.flip(0), probs.flip(0)))
    assert torch.equal(together, NoiseMap(codebook, block=7)(noise, probs))


def test_few_possible_codes_are_looked_at_alone():
    """The tokens of 400 rows are those of the whole codebook, alone too; the control leaves possible codes out."""
    codebook, probs, noise = case(240, 4, 400)
    probs = probs * (probs >= probs.topk(20).values[:, -1:])
    mapped = NoiseMap(codebook)
    whole = mapped(noise, probs)
    for support in (20, 60):
        assert torch.equal(mapped(noise, probs, support), whole)
    mapped = NoiseMap(codebook.float())
    noise, probs = noise.float(), probs.float()
    together = mapped(noise, probs, 20)
    alone = [mapped(noise[i : i + 1], probs[i : i + 1], 20) for i in range(50)]
    assert torch.equal(together[:50], torch.cat(alone)) and (together == whole).float().mean() > 0.99
    assert (mapped(noise, probs, 5) == whole).float().mean() < 0.9


def test_field_equals_its_definition():
    codebook, probs, x = case(20, 3, 10)
    for t in (0.0, 0.4, 1 - 1e-4):
        flow = Flow(probs.log(), codebook, block=6)
        logits = probs.log() - (x[:, None] - t * codebook).square().sum(dim=-1) / (2 * (1 - t) ** 2)
        mean = logits.softmax(dim=-1) @ codebook
        found = flow.at_time(x, t)
        torch.testing.assert_close(found.mean, mean)
        torch.testing.assert_close(found.weight, logits.softmax(dim=-1).amax(dim=-1))
        assert torch.equal(found.token, logits.argmax(dim=-1))
        if t > 0:
            torch.testing.assert_close(flow.at_sigma(x / t, (1 - t) / t).mean, mean)
    huge = Flow(torch.tensor([[-math.inf, 0.0, -1e4, -math.inf]]), 1e3 * random(4, 3).float(), block=1)
    assert huge.at_time(1e3 * torch.ones(1, 3), 1 - 1e-4).mean.isfinite().all()
    last, end = euler(Flow(probs.log(), codebook), x, 5)
    torch.testing.assert_close(end, last.mean)


def test_scales():
    radius, spacing = codebook_scales(torch.tensor([[0.0], [1.0], [3.0], [3.0]]))
    assert radius == pytest.approx(torch.tensor([0.0, 1, 3, 3]).std(correction=0))
    assert spacing == pytest.approx(1.0)
    assert codebook_scales(torch.ones(3, 2)) == (1.0, 1.0)
    assert noise_to_token(torch.zeros(2, 2), torch.ones(2, 1), torch.ones(1, 2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "settings",
    [{"method": "heun"}, {"steps": 1}, {"steps": True}, {"sigma_min": 0}, {"sigma_max": 1e-9},
     {"method": "euler", "sigma_max": 3.0}],
)  # fmt: skip
def test_refuses_settings(settings):
    with pytest.raises(StudioError):
        NoiseMap(torch.eye(3), **settings)


def test_refuses_shapes():
    with pytest.raises(StudioError):
        NoiseMap(torch.ones(3))
    with pytest.raises(StudioError):
        NoiseMap(torch.eye(3))(torch.zeros(2, 3), torch.ones(2, 4))
