"""Robustness to wrong tokens: the latent perturbation and the perturbed Frechet distance of RobustTok.

"Robust Latent Matters: Boosting Image Generation with Sampling Error Synthesis" (arXiv:2503.08354), sections 3.2 and
3.3. A generator errs, and mostly to codes near the right one; so tokens are exchanged for others among the nearest, and
the images that they still give are compared with the true ones: here in the judge's features.

Deviations from the authors' code: alpha = 0 changes nothing for certain, as a token is changed where a number in (0, 1]
is at most alpha; distances are computed only for images that are perturbed; which settings the paper averages over
could not be read, so `GRID` is ours and is part of every result. For tokenizers with several codes per cell, which the
paper has not, each code is exchanged on its own, for one near what the right codes before it left over.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin

from studio.checks import check_integer, check_number, set_fields
from studio.errors import StudioError
from studio.evaluation.judge import Judge, judge_scores
from studio.evaluation.metrics import frechet_distance
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.tokenizers.token_bridge import TokenBridgeTokenizer
from studio.tokenizers.vq import VQTokenizer


@dataclass(frozen=True)
class Perturbation:
    """A perturbation of tokens.

    Args:
        alpha: share of tokens that are sampled anew, 0 to 1.
        delta: among how many of the nearest codes, the right one included; 1 or more.

    Raises:
        StudioError: a value outside these.
    """

    alpha: float
    delta: int

    def __post_init__(self):
        set_fields(self, alpha=check_number("alpha", self.alpha, 0, 1), delta=check_integer("delta", self.delta, 1))


GRID = tuple(Perturbation(alpha, delta) for alpha in (0.1, 0.5) for delta in (2, 8))


def perturbed_codes(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    perturbation: Perturbation,
    *,
    beta: float = 1.0,
    generator: torch.Generator | None = None,
    chance: torch.Tensor | None = None,
    rank: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes (B, n), int64: the nearest to each vector, or, for some, a uniform choice among the `delta` nearest.

    Args:
        vectors: (B, n, C).
        codebook: (K, C).
        beta: share of the batch that is perturbed, counted from its start, as in the authors' training.
        generator: random numbers, on the device of the vectors.
        chance, rank: in place of the generator's: numbers in (0, 1] and ranks below `delta`, both (B, n); a token is
            changed where its number is at most `alpha`.

    Raises:
        StudioError: a `delta` above the number of codes.
    """
    if perturbation.delta > len(codebook):
        raise StudioError(f"delta {perturbation.delta} is more than the {len(codebook)} codes there are.")
    shape, device = vectors.shape[:2], vectors.device
    if chance is None:
        chance = 1 - torch.rand(shape, generator=generator, device=device)
    if rank is None:
        rank = torch.randint(perturbation.delta, shape, generator=generator, device=device)
    wrong = int(beta * shape[0])
    codes = torch.cdist(vectors[wrong:], codebook).argmin(dim=-1)
    nearest = torch.cdist(vectors[:wrong], codebook).topk(perturbation.delta, dim=-1, largest=False).indices
    rank = torch.where(chance <= perturbation.alpha, rank, 0)[:wrong, :, None]
    return torch.cat((nearest.gather(2, rank)[..., 0], codes))


def is_perturbable(tokenizer: ModelMixin) -> bool:
    """Whether a tokenizer has discrete codes, which can be perturbed."""
    return isinstance(tokenizer, (VQTokenizer, RVQTokenizer, OneDPieceTokenizer, TokenBridgeTokenizer))


def perturbed_tokens(
    tokenizer: ModelMixin,
    images: torch.Tensor,
    perturbation: Perturbation,
    generator: torch.Generator | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """Tokens of images (B, 3, H, W) in [-1, 1] in the form of `tokenizer.encode`, perturbed.

    `beta` is the share of the images that is perturbed, counted from the first.

    Raises:
        StudioError: a tokenizer of continuous tokens.
    """
    if not is_perturbable(tokenizer):
        raise StudioError(
            f"Tokens of a {type(tokenizer).__name__} are no codes: only discrete tokens can be perturbed."
        )
    levels = [
        perturbed_codes(vectors.flatten(1, -2), codebook.float(), perturbation, beta=beta, generator=generator).view(
            vectors.shape[:-1]
        )
        for vectors, codebook in _compared(tokenizer, images)
    ]
    return torch.stack(levels, dim=-1) if isinstance(tokenizer, RVQTokenizer) else levels[0]


def _compared(tokenizer, images):
    """What codes were chosen for: vectors (B, ..., C), float32, and codebook (K, C), of each level of codes."""
    if isinstance(tokenizer, RVQTokenizer):
        features, levels = tokenizer.encode_features(images), []
        rest, codes = features.float(), tokenizer.quantizer.encode(features)
        for table, vectors in zip(tokenizer.codebooks, tokenizer.quantizer.lookup(codes).unbind(-2)):
            levels.append((rest, table))
            rest = rest - vectors.float()
        return levels
    features = tokenizer.encode_features(images).float()
    if isinstance(tokenizer, TokenBridgeTokenizer):
        return [(features.movedim(1, -1)[..., None], tokenizer.level_values[:, None])]
    if isinstance(tokenizer, VQTokenizer):
        features = features.movedim(1, -1)
    return [(F.normalize(features, dim=-1), tokenizer.codebook)]


@torch.inference_mode()
def perturbed_frechet(
    tokenizer: ModelMixin,
    images: torch.Tensor,
    judge: Judge,
    grid: tuple[Perturbation, ...] = GRID,
    *,
    seed: int = 0,
    batch_size: int = 50,
    how: dict | None = None,
) -> dict:
    """Frechet distance, in the judge's features, between images and their reconstructions from perturbed tokens.

    Args:
        images: (n, 3, H, W) in [0, 1], more than the judge has features.
        grid: settings that the distance is averaged over.
        seed: decides which tokens go wrong.
        how: keywords of `tokenizer.decode`.

    Returns:
        `{"frechet", "by_setting"}`: the mean, and `{"alpha", "delta", "frechet"}` of each setting.
    """
    truth, found = judge_scores(judge, images).features, []
    for perturbation in grid:
        generator = torch.Generator(tokenizer.device).manual_seed(seed)
        parts = []
        for part in images.split(batch_size):
            tokens = perturbed_tokens(
                tokenizer, (part * 2 - 1).to(tokenizer.device, tokenizer.dtype), perturbation, generator
            )
            parts.append((tokenizer.decode(tokens, **(how or {})).float() / 2 + 0.5).clamp(0, 1).cpu())
        distance = frechet_distance(judge_scores(judge, torch.cat(parts)).features, truth)
        found.append({**asdict(perturbation), "frechet": distance})
    return {"frechet": sum(each["frechet"] for each in found) / len(found), "by_setting": found}
