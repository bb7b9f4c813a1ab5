"""In what precision a run computes, and which runs are compiled."""

from types import SimpleNamespace

import pytest
import torch

from studio.training import precision

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
