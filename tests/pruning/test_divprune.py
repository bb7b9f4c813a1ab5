"""DivPrune against the textbook and its own properties."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from studio.pruning import divprune as module
from studio.pruning.divprune import diverse_order, divprune, similarities
from studio.reference import pruning as textbook


def rows(tokens=60, width=8, seed=0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_same_picks_as_the_textbook(seed):
    for tokens, picks in ((2, 1), (7, 7), (60, 20), (600, 50)):
        features = rows(tokens, 16, seed)
        assert torch.equal(diverse_order(features, picks), textbook.diverse_order(features, picks))


def test_same_picks_without_the_matrix(monkeypatch):
    features = rows(600, 16)
    expected = diverse_order(features, 40)
    monkeypatch.setattr(module, "_LARGEST_MATRIX", 10)
    assert torch.equal(diverse_order(features, 40), expected)


def test_similarities_are_the_full_product():
    features = F.normalize(rows(600, 16), dim=1)
    matrix = similarities(features)
    torch.testing.assert_close(matrix, features @ features.T)
    assert torch.equal(matrix, matrix.T)


def test_one_token():
    assert diverse_order(rows(1), 1).tolist() == [0]


@pytest.mark.parametrize("spoil", ["equal rows", "zero rows", "all equal", "all zero", "infinite"])
def test_no_duplicates(spoil):
    features = rows()
    if spoil == "equal rows":
        features[10:22] = features[9]
    elif spoil == "zero rows":
        features[5:9] = 0
    elif spoil == "all equal":
        features[:] = features[0].clone()
    elif spoil == "all zero":
        features[:] = 0
    else:
        features[3] = float("inf")
    for picks in (1, 30, 59, 60):
        assert len(diverse_order(features, picks).unique()) == picks


def test_prefix():
    longest = diverse_order(rows(), 60)
    for picks in (1, 5, 40):
        assert torch.equal(diverse_order(rows(), picks), longest[:picks])


def test_scale_and_rotation_do_not_matter():
    features = rows()
    expected = diverse_order(features, 20)
    scale = torch.rand(60, 1, generator=torch.Generator().manual_seed(1)) * 50 + 0.01
    assert torch.equal(diverse_order(features * scale, 20), expected)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).Q
    assert torch.equal(diverse_order(features @ rotation, 20), expected)


def test_permutation():
    features = rows()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert torch.equal(order[diverse_order(features[order], 20)], diverse_order(features, 20))


def test_at_least_half_of_the_best_chord_distance():
    for seed in range(30):
        features = F.normalize(rows(8, 3, seed), dim=1)
        chord = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")

        def smallest(kept, chord=chord):
            return min(float(chord[a, b]) for a, b in itertools.combinations(kept, 2))

        for picks in (2, 3, 4):
            best = max(smallest(kept) for kept in itertools.combinations(range(8), picks))
            assert smallest(diverse_order(features, picks).tolist()) >= best / 2 - 1e-6


def test_half_precision_is_computed_in_float32():
    features = rows(300, 32).bfloat16()
    assert torch.equal(diverse_order(features, 40), diverse_order(features.float(), 40))


@pytest.mark.parametrize("largest", [16384, 10])
def test_no_pick_waits_for_the_device(monkeypatch, largest):
    """A tensor without values refuses whatever would have to read one, which is what makes a host wait on CUDA."""
    monkeypatch.setattr(module, "_LARGEST_MATRIX", largest)
    assert diverse_order(torch.empty(300, 8, device="meta"), 20).shape == (20,)
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty(3, device="meta").argmax().item()


def test_gradients_are_not_followed():
    assert not divprune(rows().requires_grad_(), 5).requires_grad
