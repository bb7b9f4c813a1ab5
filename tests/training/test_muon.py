"""Muon's update is close to orthogonal, whatever the shape."""

import pytest
import torch

from studio.training import muon
from studio.training.muon import Muon, hidden_matrices, muon_and_adamw, orthogonalize


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_singular_values_are_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.4 and values.max() < 1.4


def test_minimises_a_quadratic():
    target = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        (weight - target).square().mean().backward()
        optimizer.step()
    assert (weight - target).square().mean() < 0.01 * target.square().mean()


def test_a_convolution_counts_as_outputs_by_everything_else():
    flat, deep = (torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 36), (6, 4, 3, 3)))
    gradient = torch.randn(6, 36, generator=torch.Generator().manual_seed(2))
    for weight in (flat, deep):
        weight.grad = gradient.view_as(weight)
        Muon([weight], lr=0.1).step()
    assert torch.equal(flat, deep.flatten(1)) and not torch.equal(flat, torch.ones(6, 36))


def test_every_parameter_is_trained_once_at_its_own_rate():
    module = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
    table, hidden = module[0].weight, hidden_matrices(module[1])
    muon, adamw = muon_and_adamw(module, hidden, 1e-2, tables=[table])
    rates = {id(p): group["lr"] for o in (muon, adamw) for group in o.param_groups for p in group["params"]}
    count = sum(len(group["params"]) for o in (muon, adamw) for group in o.param_groups)
    assert count == len(rates) == len(list(module.parameters()))
    assert rates[id(hidden[0])] == 1e-2 and rates[id(table)] == 1e-1
    assert rates[id(module[2].weight)] == rates[id(module[1].bias)] == pytest.approx(3e-3)


@pytest.mark.parametrize("native", [True, False])
def test_muon_iterates_in_bfloat16_where_that_is_native(monkeypatch, native):
    """Both take nearly the same step; weights and momentum stay in float32."""
    seen = []
    orthogonalize = muon.orthogonalize
    monkeypatch.setattr(muon, "orthogonalize", lambda matrix: seen.append(matrix.dtype) or orthogonalize(matrix))
    monkeypatch.setattr(muon, "has_native_bf16", lambda: native)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(24, 16))
    start, weight.grad = weight.detach().clone(), torch.randn(24, 16)
    optimizer = Muon([weight], lr=0.1, weight_decay=0.0)
    optimizer.step()
    assert seen == [torch.bfloat16 if native else torch.float32]
    assert weight.dtype == optimizer.state[weight]["momentum"].dtype == torch.float32
    step = (start - weight.detach()) / (0.1 * 0.2 * 24**0.5)
    expected = orthogonalize(weight.grad)
    assert torch.nn.functional.cosine_similarity(step.flatten(), expected.flatten(), dim=0) > 0.999
    assert torch.nn.functional.cosine_similarity(step.flatten(), weight.grad.flatten(), dim=0) < 0.99  # the control
