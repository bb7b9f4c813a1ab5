"""Trees through the network against every path on its own; rows that keep different lengths."""

import pytest
import torch

from studio import LlamaGen, StudioError, backends
from studio.decoding.trees import trees_of

SIZES = {"vocab_size": 48, "dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": 4}
ROWS = [([5, 7, 9, 11, 2, 6], [-1, 0, 0, 1, 1, 3]), ([3, 8, 1], [-1, 0, 1])]


def tiny(**sizes):
    torch.manual_seed(0)
    model = LlamaGen(**{**SIZES, **({} if "caption_dim" in sizes else {"num_classes": 10}), **sizes})
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


def captions():
    vectors = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    return {"captions": vectors, "caption_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()}


def path_to(node, parents):
    return [*path_to(parents[node], parents), node] if node >= 0 else []


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, weights",
    [(kind, weights) for kind in ("classes", "captions") for weights in ("plain", "native", "float32")]
    + [("grouped", "plain"), ("grouped", "native")],  # packed weights are for as many key/value heads as heads
)
def test_every_node_sees_its_path_only(kind, weights):
    sizes = {"classes": {}, "grouped": {"num_kv_heads": 1}, "captions": {
        "caption_dim": 16, "caption_length": 5, "prefix_rope": "identity"}}[kind]  # fmt: skip
    model = tiny(**sizes)
    network = backends.select(model, weights)
    condition = captions() if kind == "captions" else {"class_labels": torch.tensor([1, 7])}
    prefix, valid = model.embed_condition(**condition)
    cache, length = network.new_tree_cache(2, 6), model.prefix_length
    torch.testing.assert_close(
        network.prefill_states(prefix, valid, cache),
        model.prefill_states(prefix, valid, model.new_tree_cache(2, 6)), atol=1e-5, rtol=1e-5,
    )  # fmt: skip
    cache.keep_all()
    sampled = [[], []]
    for kept in ([[0, 1, 4], [0]], [[0], [0, 1, 2]], [[0, 1, 3], [0, 1]], [[0], [0]]):
        tree = trees_of(ROWS, "cpu")
        before = torch.tensor([length + len(tokens) for tokens in sampled])
        assert torch.equal(cache.row_lengths, before)
        states = network.extend_tree(tree.tokens, cache, before[:, None] + tree.depths, tree.ancestors)
        logits = network.logits(states)
        for row, (tokens, parents) in enumerate(ROWS):
            one = {name: value[row : row + 1] for name, value in condition.items()}
            for node in range(len(tokens)):
                path = [*sampled[row], *(tokens[step] for step in path_to(node, parents))]
                expected = model(torch.tensor([path]), **one)[0, -1]
                torch.testing.assert_close(logits[row, node], expected, atol=1e-5, rtol=1e-5)
        cache.keep(kept)
        for row, path in enumerate(kept):
            sampled[row] += [ROWS[row][0][node] for node in path]


@torch.no_grad()
def test_rows_are_selected_cropped_and_forgotten():
    model = tiny()
    labels = torch.tensor([1, 7])
    cache = model.new_tree_cache(2, 6)
    model.prefill_states(*model.embed_condition(class_labels=labels), cache)
    cache.keep_all()
    tree = trees_of(ROWS, "cpu")
    model.extend_tree(tree.tokens, cache, 1 + tree.depths, tree.ancestors)
    cache.keep([[0, 1, 4], [0, 1]])
    cache.crop_rows([2, 9])
    assert cache.lengths == cache.row_lengths.tolist() == [2, 3]
    model.extend_tree(tree.tokens, cache, cache.row_lengths[:, None] + tree.depths, tree.ancestors)
    cache.forget()
    assert cache.length == cache.base == 3
    cache.select_rows([1])
    last = torch.tensor([[1]])
    state = model.extend_tree(last, cache, torch.tensor([[3]]), torch.ones(1, 1, 1, dtype=torch.bool))
    expected = model(torch.tensor([[3, 8, 1]]), class_labels=labels[1:])[0, -1]
    torch.testing.assert_close(model.logits(state)[0, 0], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(StudioError, match="1 pending"):
        cache.keep([[1]])
