"""Refines the tokens of an image by gradient descent on the error of its reconstruction.

The search starts at the vectors of the encoder and moves them, for one image, so that the decoder reconstructs it
better. Vectors are quantised to the nearest codes throughout, with straight-through gradients. "Content Adaptive
Optimization for Neural Image Compression" (arXiv:1906.01223) does the same for an entropy-coded network. Decoder and
file format do not change.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from studio.checks import check_integer
from studio.errors import check_stopped
from studio.tokenizers.one_d_piece import OneDPieceTokenizer

MAX_STEPS = 10_000
RATE = 0.01
"""Adam's learning rate, for unit vectors."""
_LEAST_ERROR = 1e-6  # smaller errors do not improve the loss


def refined_tokens(
    tokenizer: OneDPieceTokenizer,
    images: torch.Tensor,
    lengths: list[int],
    steps: int,
    stopped: Callable[[], bool] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens whose first few reconstruct images better than those of the encoder.

    Args:
        tokenizer: a One-D-Piece tokenizer.
        images: images (B, channels, side, side) in [-1, 1].
        lengths: how many first tokens of each image are decoded; only these are refined.
        steps: of gradient descent, 0 to 10,000, each of the cost of two or three decodings; 0: the encoder's tokens.
        stopped: called before each step; True stops.

    Returns:
        Tokens (B, N), int64, the best of all steps for each image, and their mean squared errors (B,) for pixels in
        [0, 1]. No image is worse than with the encoder's tokens.

    Raises:
        StudioError: an invalid number of steps.
        Stopped: `stopped` returned True.
    """
    steps = check_steps(steps)
    best, least = None, None
    with torch.inference_mode(False), torch.enable_grad():
        images = images.clone()
        with torch.no_grad():
            vectors = F.normalize(tokenizer.encode_features(images).float(), dim=-1)
        codebook, wanted = tokenizer.codebook.detach().float(), images.float()
        vectors.requires_grad_(True)
        optimizer = torch.optim.Adam([vectors], lr=RATE)
        for step in range(steps + 1):
            check_stopped(stopped)
            unit = F.normalize(vectors, dim=-1)
            tokens = (unit.detach() @ codebook.T).argmax(dim=-1)
            codes = unit + (codebook[tokens] - unit).detach()
            restored = tokenizer.decode_vectors(codes.to(tokenizer.dtype), lengths).float()
            shown = ((restored.detach().clamp(-1, 1) - wanted) / 2).square().mean(dim=(1, 2, 3))
            if best is None or least is None:
                best, least = tokens, shown
            better = shown < least
            best, least = torch.where(better[:, None], tokens, best), torch.where(better, shown, least)
            if step < steps:
                errors = ((restored - wanted) / 2).square().mean(dim=(1, 2, 3))
                loss = errors.clamp(min=_LEAST_ERROR).log().sum()
                (vectors.grad,) = torch.autograd.grad(loss, [vectors])
                optimizer.step()
    assert best is not None and least is not None, "the first pass sets both"
    return best, least


def check_steps(steps: int) -> int:
    """The number of steps as an `int`.

    Raises:
        StudioError: not an integer from 0 to 10,000.
    """
    return check_integer("refine", steps, 0, MAX_STEPS)
