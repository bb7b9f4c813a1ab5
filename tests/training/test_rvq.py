"""What an rvq trains with: sums of first levels, gradients, and a scale that changes no code."""

import numpy as np
import pytest
import torch

from studio.data.emoji import EmojiSource
from studio.evaluation.tokenizers import evaluate_tokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.training import rvq
from studio.training.learned_codebook import export_with_codebook, load_with_codebook

CONFIG = {
    "base_channels": 8, "channel_multipliers": (1, 1), "res_blocks": 1, "attention_levels": (1,), "z_channels": 8,
    "feature_dim": 4, "depth": 3, "codebook_size": 8, "shared_codebook": False, "norm_groups": 4,
    "pixel_unshuffle": 2, "sample_size": 16,
}  # fmt: skip


@pytest.fixture
def module():
    """A module that has seen two batches."""
    torch.manual_seed(0)
    module = rvq.TrainableRVQ(CONFIG).train()
    for _ in range(2):
        module(torch.rand(4, 3, 16, 16) * 2 - 1, torch.tensor([3]))
    return module


@torch.no_grad()
def test_levels_leave_over_what_the_exported_quantiser_leaves_over(module, tmp_path):
    export_with_codebook(module, tmp_path)
    tokenizer = RVQTokenizer.from_pretrained(tmp_path, dtype=torch.float32)
    again = rvq.TrainableRVQ(CONFIG).eval()
    load_with_codebook(again, tmp_path)
    vectors = tokenizer.encode_features(torch.rand(2, 3, 16, 16) * 2 - 1)
    rests, commitment = again.residuals(vectors)
    sums = tokenizer.quantizer.lookup(tokenizer.quantizer.encode(vectors)).cumsum(dim=-2)
    for rest, total in zip(rests, sums.unbind(-2), strict=True):
        torch.testing.assert_close(vectors - rest, total, atol=1e-5, rtol=1e-4)


def test_gradients_pass_once_and_every_level_commits(module):
    """Specification of RQ-VAE: straight-through with slope 1; the mean over levels of 2 (z - S_d) / numbers."""
    module.eval()
    for layer in module.quantizer.layers:
        layer.train()
        layer.freeze_codebook = True
    vectors = torch.randn(2, 4, 4, 4, requires_grad=True)
    rests, commitment = module.residuals(vectors)
    assert not any(rest.requires_grad for rest in rests)
    commitment.backward()
    expected = sum(2 * rest / vectors.numel() for rest in rests) / len(rests)
    torch.testing.assert_close(vectors.grad, expected, atol=1e-6, rtol=1e-4)


def test_each_part_is_restored_from_its_own_levels(module, monkeypatch):
    seen, module = [], module.eval()
    monkeypatch.setattr(
        module.tokenizer, "decode_features", lambda vectors: seen.append(vectors) or torch.zeros(6, 3, 16, 16)
    )
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    module(images, torch.tensor([3, 1, 2]))
    vectors = module.tokenizer.encode_features(images)
    rests, _ = module.residuals(vectors)
    for rows, depth in ((slice(0, 2), 3), (slice(2, 4), 1), (slice(4, 6), 2)):
        torch.testing.assert_close(seen[0][rows], (vectors - rests[depth - 1])[rows])


@torch.no_grad()
def test_another_scale_changes_no_code_and_no_image(module):
    images = torch.rand(2, 3, 16, 16) * 2 - 1

    def outcome():
        for layer, table in zip(module.quantizer.layers, module.tokenizer.quantizer.codebooks, strict=True):
            table.weight.copy_(layer._codebook.embed[0])
        codes = module.tokenizer.encode(images)
        return codes, module.tokenizer.decode(codes), module.tokenizer.encode_features(images)

    codes, originals, vectors = outcome()
    rvq.scale_vectors(module, 4.0)
    same, again, scaled = outcome()
    assert torch.equal(codes, same)
    torch.testing.assert_close(again, originals, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scaled, 4 * vectors, atol=1e-5, rtol=1e-4)


def test_half_of_a_batch_keeps_all_levels(few_images, recipe):
    few_images(8)
    made = recipe(rvq.RVQRecipe, size=16, grid=4, dim=8, codes=8, layers=1, model={"depth": 3, "z_channels": 32})
    made.open(16)
    rng, cut = np.random.default_rng(0), set()
    for _ in range(20):
        batch = made.batch(rng, 4)
        assert batch["images"].shape == (4, 3, 16, 16) and batch["depths"][:2].tolist() == [3, 3]
        cut.update(batch["depths"][2:].tolist())
    assert cut == {1, 2, 3} and made.batch(rng, 4, training=False)["depths"].tolist() == [3] * 4


def test_every_depth_is_measured(tiny_rvq, few_images):
    few_images(8)
    measured = evaluate_tokenizer(tiny_rvq, EmojiSource(16))
    assert {"psnr", "psnr_1", "psnr_2", "ssim_1", "ssim_2"} <= set(measured) and "psnr_3" not in measured
    assert measured["bits_per_pixel"] == 16 * 3 * 4 / 16**2
