"""The Fourier head: a density that is one, equal to the paper's sum, and its place in a TokenBridge."""

import math

import pytest
import torch

from studio import StudioError, TokenBridge
from studio.bench.fourier_head import roughness
from studio.models.fourier_head import FLOOR, FourierHead


def head_of(frequencies, bins=32, seed=0):
    torch.manual_seed(seed)
    head = FourierHead(8, bins, frequencies).double()
    head.weight.data *= 100
    return head


def series(real, imaginary, bins, free=None):
    """The paper's sum over autocorrelations at the bins' centres, without normalisation over bins; `free` c_k replace
    those of a."""
    a = torch.complex(real, imaginary)
    count = a.shape[-1]
    c = [(a[..., k:] * a[..., : count - k].conj()).sum(-1) for k in range(count)] if free is None else free
    z = (2 * torch.arange(bins, dtype=torch.float64) + 1) / bins - 1
    waves = sum((c[k] / c[0])[..., None] * torch.exp(1j * math.pi * k * z) for k in range(1, count))
    return 0.5 + waves.real


@pytest.mark.parametrize("frequencies", [1, 8, 31])
def test_the_product_is_the_papers_series(frequencies):
    """1,000 random laws (seed 0): none is negative, their bins sum to m / 2, and ours differ by rounding."""
    head, states = head_of(frequencies), torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = series(*(part.double() for part in head.coefficients(states)), 32)
    assert expected.min() > -1e-12 and torch.allclose(expected.sum(-1), torch.full((1000,), 16.0).double())
    found = head(states).exp() - FLOOR
    assert torch.allclose(found.double(), expected / 16, atol=2e-5)


def test_free_coefficients_are_no_density():
    """Control: of 200 laws with free c_k (seed 0), every one has a negative bin."""
    rng = torch.Generator().manual_seed(0)
    free = [torch.complex(*torch.randn(2, 200, generator=rng).double()) for _ in range(9)]
    values = series(torch.zeros(200, 9).double(), torch.zeros(200, 9).double(), 32, free)
    assert (values.min(dim=-1).values < 0).all()


def test_as_many_frequencies_as_bins_are_refused():
    for wrong in (0, 32, 40):
        with pytest.raises(StudioError, match="1 to 31 frequencies"):
            FourierHead(8, 32, wrong)


def test_scale_changes_neither_law_nor_regulariser():
    """The published regulariser grows with the fourth power of the scale, which would reward small numbers."""
    head, states = head_of(5), torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        before = head(states), float(head.roughness(states))
        head.weight *= 7
        head.bias *= 7
        assert torch.allclose(head(states), before[0], atol=1e-5)
        assert float(head.roughness(states)) == pytest.approx(before[1], rel=1e-5)


def test_more_frequencies_are_rougher_and_smoothing_is_less_rough():
    assert head_of(20).roughness(torch.ones(1, 8).double()) > head_of(1).roughness(torch.ones(1, 8).double())
    spike, flat = torch.zeros(1, 32), torch.full((1, 32), 1 / 32)
    spike[0, 3] = 1
    assert roughness(flat) == pytest.approx(0, abs=1e-6) and roughness(spike) > roughness((spike + flat) / 2) > 0.1


def test_it_learns_a_law_that_wraps_nowhere():
    """A bell around bin 20 of 32 (2,000 samples, seed 0): cross-entropy within .03 nats of the law's own entropy."""
    torch.manual_seed(0)
    bins = torch.arange(32)
    law = torch.softmax(-((bins - 20) ** 2) / 18.0, 0)
    labels, states = torch.multinomial(law, 2000, replacement=True), torch.ones(2000, 4)
    head = FourierHead(4, 32, 8)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(head(states[:1]).expand(2000, -1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = float(-(law * law.log()).sum())
    expected = float(-(law * head(states[:1])[0].log_softmax(-1)).sum())
    assert entropy <= expected < entropy + 0.03


def test_a_token_bridge_has_one_for_each_dimension(tmp_path):
    sizes = {
        "grid_size": 2, "token_dim": 3, "levels": 6, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2,
        "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "head_width": 16, "head_depth": 1, "head_heads": 2,
        "num_classes": 4, "buffer_size": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = TokenBridge(**sizes, head_frequencies=3).eval()
    assert all(isinstance(head, FourierHead) for head in model.head.channel_heads)
    states, tokens = torch.randn(5, 16), torch.randint(6, (5, 3))
    logits = model.head(states, tokens)
    assert logits.shape == (5, 3, 6)
    assert torch.allclose(logits.exp().sum(-1), torch.full((5, 3), 1 + 6 * FLOOR))
    cache, previous = model.head.new_cache(5), None
    for index in range(3):
        step = model.head.next_logits(model.head.condition_proj(states), previous, cache, first_step=False)
        assert torch.allclose(step, logits[:, index], atol=1e-5)
        previous = tokens[:, index]
    model.save_pretrained(tmp_path / "model")
    loaded = TokenBridge.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.head_frequencies == 3 and torch.equal(loaded.head(states, tokens), logits)
    assert not any(isinstance(head, FourierHead) for head in TokenBridge(**sizes).head.channel_heads)
