"""ResGen's loop: how often the network is called, what stays, what a perfect head gives."""

import math

import pytest
import torch

from studio import StudioError
from studio.decoding.resgen import FirstHitting, ResGenDecoding, resgen_decoding
from studio.decoding.residual_masks import hidden_after_calls
from studio.decoding.sampling import Sampling
from studio.models.gaussian_mixture import GaussianMixture, Mixture
from studio.models.resgen import ResGen
from studio.tokenizers.residual_quantizer import ResidualQuantizer

POSITIONS = 6


def quantizer_of(depth):
    torch.manual_seed(0)
    return ResidualQuantizer((7,) * depth, 4, shared=False)


def tiny(depth=3, **more):
    torch.manual_seed(0)
    model = ResGen(
        num_positions=POSITIONS, depth=depth, vocab_size=7, code_dim=4, dim=16, num_layers=1, num_heads=2,
        num_classes=5, components=5, rank=2, sigma=0.3, **more,
    )  # fmt: skip
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.3)
    return model.eval()


def sample(model, quantizer, rows=2, scale=1.0, on_step=None, first=0, kind=ResGenDecoding, sampling=None, **settings):
    return resgen_decoding(
        model,
        quantizer,
        {"class_labels": torch.arange(first, first + rows)},
        generators=[torch.Generator().manual_seed(row) for row in range(first, first + rows)],
        sampling=sampling,
        guidance_scale=scale,
        settings=kind(**settings),
        on_step=on_step,
    ).tokens


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("prediction", ["mixture", "levels"])
def test_calls_are_steps_whatever_the_depth(depth, prediction):
    model, calls = tiny(depth, prediction=prediction), []
    model.register_forward_hook(lambda *_: calls.append(1))
    codes = sample(model, quantizer_of(depth), steps=5)
    assert len(calls) == 5 and codes.shape == (2, POSITIONS, depth)
    assert codes.min() >= 0 and codes.max() < 7


@pytest.mark.parametrize("prediction", ["mixture", "levels"])
@pytest.mark.parametrize("confidence", ["cell", "level"])
@pytest.mark.parametrize("schedule", ["cosine", "circle", "arccos"])
def test_what_is_shown_stays_and_numbers_follow_the_schedule(prediction, confidence, schedule):
    seen = []
    last = sample(
        tiny(prediction=prediction), quantizer_of(3), scale=2.0, steps=7, sampling=Sampling(top_p=0.9),
        confidence=confidence, schedule=schedule, on_step=lambda step, codes: seen.append(codes.clone()),
    )  # fmt: skip
    assert len(seen) == 7 and torch.equal(seen[-1], last)
    for codes, expected in zip(seen, hidden_after_calls(7, POSITIONS * 3, schedule), strict=True):
        assert ((codes < 0).sum(dim=(1, 2)) == expected).all()
        assert ((codes[..., 1:] < 0) >= (codes[..., :-1] < 0)).all()
    for before, after in zip(seen, seen[1:]):
        assert torch.equal(torch.where(before < 0, -1, after), before)


@pytest.mark.parametrize("kind", [ResGenDecoding, FirstHitting])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["mixture", "levels"])
def test_a_batch_equals_its_single_images(prediction, scale, kind):
    model, quantizer = tiny(prediction=prediction), quantizer_of(3)
    together = sample(model, quantizer, rows=3, scale=scale, steps=4, kind=kind)
    for row in range(3):
        alone = sample(model, quantizer, rows=1, first=row, scale=scale, steps=4, kind=kind)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("prediction", ["mixture", "levels"])
def test_without_temperature_and_noise_nothing_is_random(prediction):
    model, quantizer = tiny(prediction=prediction), quantizer_of(3)
    calm = {"sampling": Sampling(temperature=0), "confidence_temperature": 0.0, "steps": 3}
    condition = {"class_labels": torch.zeros(1, dtype=torch.long)}
    one, other = (
        resgen_decoding(
            model, quantizer, condition, generators=[torch.Generator().manual_seed(seed)],
            sampling=calm["sampling"], settings=ResGenDecoding(steps=3, confidence_temperature=0.0),
        ).tokens
        for seed in (0, 1)
    )  # fmt: skip
    assert torch.equal(one, other) and torch.equal(one, sample(model, quantizer, rows=1, **calm))


@pytest.mark.parametrize("prediction", ["mixture", "levels"])
def test_cells_and_levels_are_different_confidences(prediction):
    model, quantizer = tiny(prediction=prediction), quantizer_of(3)
    cell, level = (sample(model, quantizer, steps=4, confidence=kind, rows=4) for kind in ("cell", "level"))
    assert not torch.equal(cell, level)


class Oracle(torch.nn.Module):
    """Says exactly what is missing of known images: one component, whose mean is the sum of the hidden levels."""

    def __init__(self, sums):
        super().__init__()
        self.config = type("Config", (), {"prediction": "mixture", "num_positions": sums.shape[1]})
        self.sums = sums
        code_dim = sums.shape[-1]
        self.head = GaussianMixture(1, code_dim, components=1, rank=code_dim, sigma=0.1, learn_sigma=False)
        torch.nn.init.eye_(self.head.projection)
        torch.nn.init.zeros_(self.head.offsets)

    def forward(self, visible, hidden, class_labels):
        return Mixture(visible.new_zeros(*hidden.shape, 1), (self.sums - visible)[:, :, None])


@pytest.mark.parametrize("steps", [1, 3, 8, 24])
@pytest.mark.parametrize("how", [{"confidence": "cell"}, {"confidence": "level"}, {"kind": FirstHitting}])
def test_a_perfect_head_gives_the_codes_back(steps, how):
    quantizer = quantizer_of(4)
    codes = quantizer.encode(torch.randn(2, POSITIONS, 4, generator=torch.Generator().manual_seed(3)))
    for level, table in enumerate(quantizer.codebooks):
        table.weight.mul_(0.02**level)
    oracle = Oracle(quantizer.lookup(codes).sum(dim=-2))
    sampled = sample(oracle, quantizer, steps=steps, scatter=0.0, **how)
    assert torch.equal(sampled, codes)


def test_stops_when_told():
    codes = sample(tiny(), quantizer_of(3), steps=6, on_step=lambda step, codes: step == 1)
    assert (codes < 0).any()


def test_what_is_changed_meanwhile_stays():
    def change(step, codes):
        if step == 0:
            codes[codes >= 0] = 5

    first = []
    codes = sample(
        tiny(), quantizer_of(3), steps=3, on_step=lambda *seen: first.append(seen[1].clone()) or change(*seen)
    )
    shown = first[0] >= 0
    assert shown.any() and (codes[shown] == 5).all()


def test_calls_are_counted():
    model, condition = tiny(), {"class_labels": torch.tensor([0, 1])}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    settings = ResGenDecoding(steps=4)
    sampled = resgen_decoding(
        model, quantizer_of(3), condition, generators=generators, guidance_scale=2.0, settings=settings
    )
    assert (sampled.target_calls, sampled.row_calls) == (4, 2 + 3 * 4)  # the first call is not guided yet
    assert set(sampled.seconds) == {"transformer", "head"}


def test_first_hitting_shows_one_code_after_the_other_in_a_random_order():
    """400 images (seeds from 0) in as many calls as codes: each cell is hit as often as any other, level by level;
    the numbers after a third of the calls have the distribution of hiding, within 5 standard deviations."""
    rows, depth = 400, 2
    slots, seen = POSITIONS * depth, []
    model = tiny(depth)
    resgen_decoding(
        model,
        quantizer_of(depth),
        {"class_labels": torch.zeros(rows, dtype=torch.long)},
        generators=[torch.Generator().manual_seed(row) for row in range(rows)],
        settings=FirstHitting(steps=slots),
        on_step=lambda step, codes: seen.append((codes < 0).sum(dim=2)),
    )
    for number, hidden in enumerate(seen):
        assert (hidden.sum(dim=1) == slots - 1 - number).all()
    first = (seen[0] < depth).double().mean(dim=0)
    chance = 1 / POSITIONS
    assert ((first - chance).abs() < 5 * (chance * (1 - chance) / rows) ** 0.5).all()
    left = seen[slots // 3 - 1]
    both = math.comb(slots - 2, slots // 3 - 2) / math.comb(slots, slots // 3)
    share = (left == 0).double().mean(dim=0)
    assert ((share - both).abs() < 5 * (both * (1 - both) / rows) ** 0.5).all()


def test_one_code_a_call_samples_the_distribution_that_the_network_gives():
    """Two cells of two levels of two codes, 3,000 images: all 16 joint outcomes against the product of the
    ablation's own conditionals, averaged over every order of hits, within 5 standard deviations."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer((2, 2), 4, shared=False)
    model = ResGen(
        num_positions=2, depth=2, vocab_size=2, code_dim=4, dim=16, num_layers=1, num_heads=2, num_classes=2,
        prediction="levels",
    ).eval()  # fmt: skip
    for weight in (model.blocks[0].modulation.weight, model.head.linear.weight):
        torch.nn.init.normal_(weight, std=0.5)
    rows = 3000
    generator = torch.Generator().manual_seed(0)
    sampled = resgen_decoding(
        model,
        quantizer,
        {"class_labels": torch.zeros(rows, dtype=torch.long)},
        generators=[generator] * rows,
        settings=FirstHitting(steps=4),
    ).tokens
    exact = _distribution(model, quantizer, torch.full((2, 2), -1))
    assert sum(exact.values()) == pytest.approx(1)
    for outcome, chance in exact.items():
        found = (sampled.flatten(1) == torch.tensor(outcome)).all(dim=1).double().mean()
        assert abs(found - chance) < 5 * (chance * (1 - chance) / rows) ** 0.5, outcome


def _distribution(model, quantizer, codes):
    """{codes: probability} of all images that go on from `codes` (L, D), by the textbook: hit by hit."""
    hidden = (codes < 0).sum(dim=1)
    if not hidden.any():
        return {tuple(codes.flatten().tolist()): 1.0}
    with torch.no_grad():
        visible = quantizer.lookup(codes[None]).sum(dim=-2)
        said = model(visible, hidden[None], class_labels=torch.zeros(1, dtype=torch.long)).logits.softmax(dim=-1)[0]
    distribution = {}
    for cell, levels in enumerate(hidden.tolist()):
        for code in range(2 if levels else 0):
            chance = levels / int(hidden.sum()) * float(said[cell, 2 - levels, code])
            after = codes.clone()
            after[cell, 2 - levels] = code
            for outcome, rest in _distribution(model, quantizer, after).items():
                distribution[outcome] = distribution.get(outcome, 0) + chance * rest
    return distribution


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 2.5}, {"scatter": -1}, {"confidence": "x"}, {"schedule": "x"},
     {"confidence_temperature": float("nan")}],
)  # fmt: skip
def test_settings_refuse(wrong):
    with pytest.raises(StudioError, match=next(iter(wrong))):
        ResGenDecoding(**wrong)


def test_a_spread_that_is_not_there_is_refused():
    sample(tiny(), quantizer_of(3), steps=2, scatter=0.5)
    with pytest.raises(StudioError, match="leave out scatter"):
        sample(tiny(prediction="levels"), quantizer_of(3), steps=2, scatter=0.5)


def test_more_calls_than_codes_are_refused():
    for kind in (ResGenDecoding, FirstHitting):
        with pytest.raises(StudioError, match="18 codes"):
            sample(tiny(), quantizer_of(3), steps=19, kind=kind)
