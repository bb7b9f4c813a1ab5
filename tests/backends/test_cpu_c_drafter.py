"""The drafter in C against the one in torch."""

import pytest
import torch

from studio import LlamaGen, backends
from studio.backends import cpu_c
from studio.backends.cpu_c import NativeDrafter
from studio.decoding.trees import trees_of
from studio.models.drafter import Drafter


def drafter_of(layers=1, halves=False, **sizes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": 4, **sizes}
    target = LlamaGen(**sizes, caption_dim=16, caption_length=5, prefix_rope="identity")
    drafter = Drafter.for_target(target, num_layers=layers).eval()
    for weight in drafter.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return drafter.bfloat16().float() if halves else drafter


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_guesses_are_the_drafters_own(layers, halves, kv_heads):
    drafter = drafter_of(layers, halves, num_kv_heads=kv_heads)
    backend = backends.select_drafter(drafter)
    assert isinstance(backend, NativeDrafter) and backends.select_drafter(drafter) is backend
    rows, valid = 2, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    ours, own = backend.new_tree_cache(rows, 8), drafter.new_tree_cache(rows, 8)
    for cache in (ours, own):
        cache.mask_prefix(valid)
    chain = trees_of([([0, 0, 0, 0, 7, 3], [-1, 0, 1, 2, 3, 4])] * rows, "cpu")
    tree = trees_of([([5, 7, 9, 11], [-1, 0, 0, 1]), ([1, 2, 3], [-1, 0, 1])], "cpu")
    for drafts, kept in ((chain, 6), (tree, None)):
        states = torch.randn(rows, drafts.tokens.shape[1], 32)
        positions = ours.row_lengths[:, None] + drafts.depths
        guesses = [
            network.extend_tree(drafts.tokens, states, cache, positions, drafts.ancestors)
            for network, cache in ((backend, ours), (drafter, own))
        ]
        torch.testing.assert_close(*guesses, atol=2e-5, rtol=2e-5)
        for cache in (ours, own):
            cache.keep_all() if kept else cache.forget()


def test_the_drafter_itself_runs_where_it_must(monkeypatch):
    drafter = drafter_of()
    assert backends.select_drafter(drafter, "plain") is drafter
    monkeypatch.setattr(cpu_c, "library", lambda: None)
    assert backends.select_drafter(drafter) is drafter
