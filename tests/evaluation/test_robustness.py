"""Wrong tokens: which ones go wrong and to what, in every tokenizer, and the distance of what is restored."""

import pytest
import torch

from studio import RVQTokenizer, StudioError, TokenBridgeTokenizer, VQTokenizer
from studio.evaluation.judge import Judge, judge_scores
from studio.evaluation.metrics import frechet_distance
from studio.evaluation.robustness import Perturbation, perturbed_codes, perturbed_frechet, perturbed_tokens
from studio.tokenizers.kl import KLTokenizer

AUTOENCODER = {
    "block_out_channels": [4, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
MAKE = {
    "vq": lambda: VQTokenizer(
        base_channels=8, channel_multipliers=(1, 2), encoder_res_blocks=1, decoder_res_blocks=1, z_channels=8,
        code_dim=4, codebook_size=64, norm_groups=4, sample_size=16,
    ),
    "rvq": lambda: RVQTokenizer(
        base_channels=8, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(), z_channels=8, feature_dim=4,
        depth=3, codebook_size=16, norm_groups=4, sample_size=16,
    ),
    "bridge": lambda: TokenBridgeTokenizer({"autoencoder": AUTOENCODER, "scaling_factor": 1.0}, levels=16,
                                           sample_size=16),
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    return MAKE[name]().eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


VECTORS, CODEBOOK = torch.randn(6, 500, 3, generator=seeded(1)), torch.randn(20, 3, generator=seeded(2))


def test_wrong_codes_are_among_the_nearest_and_as_many_as_asked_for():
    """3,000 tokens (seed 0): shares of every rank within 5 standard errors."""
    codes = perturbed_codes(VECTORS, CODEBOOK, Perturbation(0.6, 4), generator=seeded())
    ranks = (VECTORS[:, :, None] - CODEBOOK).square().sum(dim=-1).argsort(dim=-1).argsort(dim=-1)
    found = ranks.gather(2, codes[..., None]).flatten().bincount(minlength=20) / 3000
    expected = torch.tensor([0.4 + 0.15, 0.15, 0.15, 0.15] + [0.0] * 16)
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 3000).sqrt()).all()


@pytest.mark.parametrize(("alpha", "delta"), [(0.0, 5), (1.0, 1)])
def test_nothing_is_changed(alpha, delta):
    codes = perturbed_codes(VECTORS, CODEBOOK, Perturbation(alpha, delta), generator=seeded())
    assert torch.equal(codes, torch.cdist(VECTORS, CODEBOOK).argmin(dim=-1))


def test_only_the_start_of_the_batch_is_changed():
    clean = perturbed_codes(VECTORS, CODEBOOK, Perturbation(0.0, 1))
    part = perturbed_codes(VECTORS, CODEBOOK, Perturbation(1.0, 9), beta=0.5, generator=seeded())
    assert torch.equal(part[3:], clean[3:]) and all(not torch.equal(*rows) for rows in zip(part[:3], clean[:3]))


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_tokens_of_every_tokenizer(name):
    tokenizer, images = made(name), torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    tokens = tokenizer.encode(images)
    assert torch.equal(perturbed_tokens(tokenizer, images, Perturbation(1.0, 1)), tokens)
    wrong = perturbed_tokens(tokenizer, images, Perturbation(0.5, 4), seeded())
    assert wrong.shape == tokens.shape and wrong.dtype == tokens.dtype
    share = float((wrong != tokens).float().mean())
    assert abs(share - 0.5 * 3 / 4) < 5 * (0.375 * 0.625 / tokens.numel()) ** 0.5
    if name == "bridge":
        assert (wrong - tokens).abs().max() <= 3


@torch.no_grad()
def test_distance_of_what_is_restored():
    tokenizer, images = made("vq"), torch.rand(12, 3, 16, 16, generator=seeded())
    judge = Judge(num_concepts=5, widths=(8, 8, 8), feature_dim=4, sample_size=16).eval()
    grid = (Perturbation(0.0, 3), Perturbation(1.0, 64))
    found = perturbed_frechet(tokenizer, images, judge, grid, batch_size=5)
    restored = (tokenizer.decode(tokenizer.encode(images * 2 - 1)) / 2 + 0.5).clamp(0, 1)
    clean = frechet_distance(judge_scores(judge, restored).features, judge_scores(judge, images).features)
    first, second = found["by_setting"]
    assert first == {"alpha": 0.0, "delta": 3, "frechet": pytest.approx(clean, rel=1e-3)}
    assert second["frechet"] != pytest.approx(clean, rel=1e-3)
    assert found["frechet"] == pytest.approx((first["frechet"] + second["frechet"]) / 2)


def test_refused():
    for wrong in ({"alpha": 1.5, "delta": 2}, {"alpha": 0.5, "delta": 0}, {"alpha": float("nan"), "delta": 2}):
        with pytest.raises(StudioError, match="alpha|delta"):
            Perturbation(**wrong)
    with pytest.raises(StudioError, match="the 20 codes"):
        perturbed_codes(VECTORS, CODEBOOK, Perturbation(0.5, 21))
    with pytest.raises(StudioError, match="KLTokenizer"):
        perturbed_tokens(KLTokenizer(AUTOENCODER), torch.zeros(1, 3, 16, 16), Perturbation(0.5, 2))
