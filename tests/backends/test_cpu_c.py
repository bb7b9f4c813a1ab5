"""The network in C against that in torch: same numbers for any number of rows, trees, and a way without a compiler."""

import pytest
import torch

from studio import backends
from studio.backends import cpu_c
from studio.backends.cpu_c import NativeLlamaGen
from studio.backends.packed import PackedLlamaGen
from studio.decoding.trees import Tree
from studio.errors import StudioError
from studio.models.llamagen import LlamaGen

CLASSES = {"vocab_size": 64, "dim": 64, "num_heads": 4, "num_layers": 2, "grid_size": 4, "num_classes": 10}
CAPTIONS = {
    "vocab_size": 128, "dim": 48, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 104, "num_layers": 3, "grid_size": 5,
    "caption_dim": 16, "caption_length": 5, "prefix_rope": "identity",
}  # fmt: skip
REGIONS = {**CAPTIONS, "grid_size": 6, "plan_size": 2}
KINDS = {"argnames": "sizes", "argvalues": [CLASSES, CAPTIONS, REGIONS], "ids": ["classes", "captions", "regions"]}


def model_of(sizes, halves=False):
    torch.manual_seed(0)
    model = LlamaGen(**sizes).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.bfloat16().float() if halves else model


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(cpu_c, "library", lambda: None)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 11, 16, 17])
@pytest.mark.parametrize(**KINDS)
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
def test_every_step_equals_the_models_own(rows, sizes, halves):
    model = model_of(sizes, halves)
    network = NativeLlamaGen(model)
    assert bool(network._blocks.network.bf16) == halves
    condition = {"class_labels": torch.arange(rows) % 10}
    if "caption_dim" in sizes:
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool().repeat(rows, 1)[:rows]
        condition = {"captions": torch.randn(rows, 5, 16), "caption_mask": mask}
    prefix, valid = model.embed_condition(**condition)
    ours, own = network.new_cache(rows), model.new_cache(rows)
    network.prefill(prefix, valid, ours)
    model.prefill(prefix, valid, own)
    tokens = torch.randint(64, (rows, 12))
    for place in range(12):
        step = tokens[:, place : place + 1]
        expected = model.extend(step, own)
        torch.testing.assert_close(network.extend(step, ours), expected, atol=2e-5, rtol=2e-5)
        if place == 8 and rows > 2:
            rows = rows // 2
            tokens = tokens[:rows]
            ours.keep_rows(rows)
            own.keep_rows(rows)


@torch.no_grad()
@pytest.mark.parametrize(**KINDS)
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
def test_trees_and_batches_change_no_bit(sizes, halves):
    """Trees of up to 13 nodes over rows of different lengths, some with padding, beside every path token by token."""
    model, rows = model_of({**sizes, "grid_size": 6}, halves), 3
    network = NativeLlamaGen(model)
    condition = {"class_labels": torch.arange(rows)}
    if "caption_dim" in sizes:
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
        condition = {"captions": torch.randn(rows, 5, 16), "caption_mask": mask}
    prefix, valid = model.embed_condition(**condition)
    length, cache = network.prefix_length, network.new_tree_cache(rows, 13)
    network.prefill_states(prefix, valid, cache)
    cache.keep_all()
    sampled = [[] for _ in range(rows)]
    for nodes in (5, 13, 2, 8):
        parents = [[-1, *(int(torch.randint(node, (1,))) for node in range(1, nodes))] for _ in range(rows)]
        tree = Tree(torch.randint(64, (rows, nodes)), torch.tensor(parents))
        places = cache.row_lengths[:, None] + tree.depths
        states = network.extend_tree(tree.tokens, cache, places, tree.ancestors)
        ends = [nodes - 1 - row % 2 for row in range(rows)]
        paths = [torch.nonzero(tree.ancestors[row, end])[:, 0].tolist() for row, end in enumerate(ends)]
        for row, path in enumerate(paths):
            alone = network.new_cache(1)
            network.prefill_states(prefix[row : row + 1], None if valid is None else valid[row : row + 1], alone)
            for token in sampled[row]:
                network.extend(torch.tensor([[token]]), alone)
            for node in path:
                token = tree.tokens[row, node].view(1, 1)
                assert torch.equal(network.extend(token, alone)[0, 0], network.logits(states[row, node]))
            sampled[row] += tree.tokens[row, path].tolist()
        cache.keep(paths)
    assert cache.lengths == [length + len(tokens) for tokens in sampled] and len(set(map(len, sampled))) > 1


@torch.no_grad()
def test_a_full_cache_is_refused():
    model = model_of(CLASSES)
    network = NativeLlamaGen(model)
    cache = network.new_cache(1)
    network.prefill(*model.embed_condition(class_labels=torch.tensor([1])), cache)
    for _ in range(16):
        network.extend(torch.tensor([[3]]), cache)
    with pytest.raises(StudioError, match="17 positions; 18"):
        network.extend(torch.tensor([[3]]), cache)


def test_the_fastest_backend_that_works_is_selected(monkeypatch):
    model = model_of(CLASSES)
    assert isinstance(backends.select(model), NativeLlamaGen)
    assert backends.select(model) is backends.select(model)
    assert backends.select(model, "plain") is model
    assert isinstance(backends.select(model, "float32"), PackedLlamaGen)
    assert isinstance(backends.select(model_of({**CLASSES, "vocab_size": 60})), PackedLlamaGen)
    monkeypatch.setattr(backends, "_LARGEST_COPY_BYTES", 1)
    assert backends.select(model) is model


def test_changed_weights_make_a_new_backend():
    model = model_of(CLASSES, halves=True)
    before = backends.select(model)
    model.output.weight.data[0, 0] += 1
    assert backends.select(model) is not before


def test_without_a_compiler_the_next_best_is_taken(no_compiler):
    model = model_of(CLASSES)
    assert isinstance(backends.select(model), PackedLlamaGen)
    with pytest.raises(StudioError, match="compiler"):
        backends.select(model, "native")
