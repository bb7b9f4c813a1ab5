"""ResGen's loop: how often the network is called, what stays, what a perfect head gives."""

import pytest
import torch

from studio import StudioError
from studio.decoding.residual_masks import hidden_slots
from studio.decoding.residual_unmasking import ResidualUnmasking, residual_unmasking
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


def draw(model, quantizer, rows=2, scale=1.0, on_step=None, first=0, **settings):
    return residual_unmasking(
        model,
        quantizer,
        {"class_labels": torch.arange(first, first + rows)},
        generators=[torch.Generator().manual_seed(row) for row in range(first, first + rows)],
        guidance_scale=scale,
        settings=ResidualUnmasking(**settings),
        on_step=on_step,
    )


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("prediction", ["mixture", "levels"])
def test_calls_are_steps_whatever_the_depth(depth, prediction):
    model, calls = tiny(depth, prediction=prediction), []
    model.register_forward_hook(lambda *_: calls.append(1))
    codes = draw(model, quantizer_of(depth), steps=5)
    assert len(calls) == 5 and codes.shape == (2, POSITIONS, depth)
    assert codes.min() >= 0 and codes.max() < 7


@pytest.mark.parametrize("prediction", ["mixture", "levels"])
@pytest.mark.parametrize("confidence", ["cell", "level"])
@pytest.mark.parametrize("schedule", ["cosine", "circle", "arccos"])
def test_what_is_shown_stays_and_numbers_follow_the_schedule(prediction, confidence, schedule):
    seen = []
    last = draw(
        tiny(prediction=prediction), quantizer_of(3), scale=2.0, steps=7, top_p=0.9,
        confidence=confidence, schedule=schedule, on_step=lambda step, codes: seen.append(codes.clone()),
    )  # fmt: skip
    assert len(seen) == 7 and torch.equal(seen[-1], last)
    for step, codes in enumerate(seen):
        expected = hidden_slots((step + 1) / 7, POSITIONS * 3, schedule)
        assert ((codes < 0).sum(dim=(1, 2)) == expected).all()
        assert ((codes[..., 1:] < 0) >= (codes[..., :-1] < 0)).all()
    for before, after in zip(seen, seen[1:]):
        assert torch.equal(torch.where(before < 0, -1, after), before)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["mixture", "levels"])
def test_a_batch_equals_its_single_pictures(prediction, scale):
    model, quantizer = tiny(prediction=prediction), quantizer_of(3)
    together = draw(model, quantizer, rows=3, scale=scale, steps=4)
    for row in range(3):
        assert torch.equal(draw(model, quantizer, rows=1, first=row, scale=scale, steps=4)[0], together[row])


class Oracle(torch.nn.Module):
    """Says exactly what is missing of known pictures: one component, whose mean is the sum of the hidden levels."""

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


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("confidence", ["cell", "level"])
def test_a_perfect_head_gives_the_codes_back(steps, confidence):
    quantizer = quantizer_of(4)
    codes = quantizer.encode(torch.randn(2, POSITIONS, 4, generator=torch.Generator().manual_seed(3)))
    for level, table in enumerate(quantizer.codebooks):
        table.weight.mul_(0.02**level)
    oracle = Oracle(quantizer.lookup(codes).sum(dim=-2))
    drawn = draw(oracle, quantizer, steps=steps, scatter=0.0, confidence=confidence)
    assert torch.equal(drawn, codes)


def test_stops_when_told():
    codes = draw(tiny(), quantizer_of(3), steps=6, on_step=lambda step, codes: step == 1)
    assert (codes < 0).any()


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 2.5}, {"top_p": 0}, {"scatter": -1}, {"confidence": "x"}, {"schedule": "x"},
     {"confidence_temperature": float("nan")}],
)  # fmt: skip
def test_settings_refuse(wrong):
    with pytest.raises(StudioError):
        ResidualUnmasking(**wrong)
