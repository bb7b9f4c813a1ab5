"""Attention by plain products is that of PyTorch, and is taken where it should be only."""

import pytest
import torch
import torch.nn.functional as F

from studio.training import attention
from studio.training.attention import LONGEST, PlainAttention, plain_attention


def parts(length=20, keys=24, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, 16, dtype=dtype, requires_grad=True) for n in (length, keys, keys)]


def gradients(attend, inputs, **options):
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs, **options)
    return out, *torch.autograd.grad(out.float().square().sum(), inputs)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.5},
    "bool": {"attn_mask": torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(1)) < 0.7},
    "bias": {"attn_mask": torch.where(torch.arange(24) < 20, torch.linspace(-1, 1, 24), float("-inf"))[None]},
}


@pytest.mark.parametrize("name", MASKS)
def test_plain_products_are_attention(name):
    options = MASKS[name]
    expected = gradients(F.scaled_dot_product_attention, parts(24), **options)
    found = gradients(plain_attention, parts(24), **options)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).abs().max() < 0.02 * other.float().abs().max()
    other = gradients(plain_attention, parts(24), **({"scale": 1.0} if name != "scale" else {}))
    assert (other[0].float() - expected[0].float()).abs().max() > 0.05  # negative control


def test_heads_that_share_keys():
    query, key, value = parts(24)
    shared = [query, key[:, :1], value[:, :1]]
    expected = gradients(F.scaled_dot_product_attention, shared, enable_gqa=True)[0]
    assert (gradients(plain_attention, shared, enable_gqa=True)[0] - expected).abs().max() < 0.02


def test_a_query_that_sees_nothing_stays_finite():
    mask = torch.zeros(24, 24, dtype=torch.bool)
    for given in (mask, torch.zeros(24, 24).masked_fill(~mask, float("-inf"))):
        assert all(part.isfinite().all() for part in gradients(plain_attention, parts(24), attn_mask=given))


def test_where_plain_products_are_taken(monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "plain_attention", lambda *args, **options: taken.append(1) or args[0])

    def takes(inputs, autocast=True, **options):
        taken.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), PlainAttention():
            F.scaled_dot_product_attention(*inputs, **options)
        return bool(taken)

    assert takes(parts()) and takes(parts(keys=LONGEST)) and takes(parts(), attn_mask=None)
    assert not takes(parts(keys=LONGEST + 1)) and not takes(parts(), autocast=False)
    assert not takes([part.detach() for part in parts()])
    with torch.no_grad():
        assert not takes(parts())
