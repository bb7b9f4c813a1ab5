"""In what precision a run computes, and which runs are compiled."""

from types import SimpleNamespace

import pytest
import torch

from studio.training import muon, precision
from studio.training.muon import Muon

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recipe(minutes=60, compiles=True, compiles_on_cpu=True):
    options = SimpleNamespace(minutes=minutes)
    return SimpleNamespace(options=options, compiles=compiles, compiles_on_cpu=compiles_on_cpu)


@pytest.fixture
def able(monkeypatch):
    """A CPU with bfloat16 units and a compiler."""
    monkeypatch.setattr(precision, "has_native_bf16", lambda: True)
    monkeypatch.setenv("CXX", "c++")


def test_a_long_run_of_a_transformer_is_compiled_on_a_cpu(able):
    assert precision.is_compiled(recipe(minutes=30), CPU)


@pytest.mark.parametrize("what", [{"minutes": 29}, {"minutes": None}, {"compiles_on_cpu": False}], ids=str)
def test_a_short_run_and_other_networks_are_not(able, what):
    assert not precision.is_compiled(recipe(**what), CPU)


def test_without_units_or_a_compiler_nothing_is(able, monkeypatch):
    monkeypatch.setattr(precision, "has_native_bf16", lambda: False)
    assert not precision.is_compiled(recipe(), CPU)
    monkeypatch.undo()
    monkeypatch.setattr(precision, "has_native_bf16", lambda: True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not precision.is_compiled(recipe(), CPU)


def test_on_cuda_a_recipe_says_so_of_itself():
    assert precision.is_compiled(recipe(minutes=None, compiles_on_cpu=False), CUDA)
    assert not precision.is_compiled(recipe(compiles=False), CUDA)


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
