"""Tokens of images for `token_statistics`: of the emoji set or of a folder, and of images that a pipeline samples."""

import numpy as np
import torch

from studio.checkpoints.loading import load
from studio.checks import check_integer
from studio.data.source import EMOJI, open_source
from studio.errors import StudioError
from studio.evaluation.token_statistics import TokenGrid
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.tokenizers.token_bridge import TokenBridgeTokenizer, low_frequency_order

BATCH = 50
LEVELS = 32
"""Levels of a number of a continuous tokenizer."""
MAX_IMAGES = 100_000


@torch.no_grad()
def token_grids(
    name: str, *, data: str | None = None, images: int = 600, seed: int = 0, device: str | None = None
) -> list[TokenGrid]:
    """Tokens of validation images under a tokenizer, and of what a pipeline samples for their captions or classes.

    Args:
        name: a tokenizer or pipeline by bundled name or folder.
        data: a folder of images; the emoji set when None.
        images: how many, at most as many as there are.
        seed: of the first sampled image; image i has `seed` + i.
        device: where the model runs.

    Returns:
        A grid for each level of codes: one for a VQ or a row, as many as levels for residual codes, and the first
        dimension of the levels of a TokenBridge. A continuous tokenizer has those that a TokenBridge of 32 levels makes
        of it.

    Raises:
        StudioError: neither an image tokenizer nor a pipeline over discrete tokens.
    """
    images, seed = check_integer("images", images, 1, MAX_IMAGES), check_integer("seed", seed)
    model = load(name, device=device)
    tokenizer = getattr(model, "image_tokenizer", model)
    if not hasattr(tokenizer, "encode") or (isinstance(tokenizer, KLTokenizer) and model is not tokenizer):
        raise StudioError(f"{name} has no discrete tokens: name an image tokenizer, or a pipeline over one.")
    source = open_source(data or EMOJI, tokenizer.config.sample_size)
    examples = source.validation
    batches = [range(start, min(start + BATCH, images, len(examples))) for start in range(0, images, BATCH)]
    batches = [batch for batch in batches if len(batch)]
    dtype = next(tokenizer.parameters()).dtype
    if isinstance(tokenizer, KLTokenizer):
        latents = tokenizer.encode(examples.images(batches[0]).to(tokenizer.device, dtype))
        order = low_frequency_order(latents)
        model = tokenizer = TokenBridgeTokenizer.from_autoencoder(tokenizer, levels=LEVELS, dimension_order=order)
    true = [tokenizer.encode(examples.images(batch).to(tokenizer.device, dtype)).cpu() for batch in batches]
    grids = _levels(name if model is tokenizer else f"{name}, true images", tokenizer, torch.cat(true))
    if model is tokenizer:
        return grids
    if model.takes_text != source.has_captions:
        raise StudioError(
            f"{name} is conditioned on {'captions' if model.takes_text else 'classes'}: the data has none."
        )
    model.set_progress_bar_config(disable=True)
    sampled = []
    for batch in batches:
        given = (
            {"prompt": examples.captions(batch)}
            if model.takes_text
            else {"class_labels": examples.labels(batch).tolist()}
        )
        generators = [torch.Generator().manual_seed(seed + number) for number in batch]
        sampled.append(model(**given, generator=generators, output_type="tokens").tokens.cpu())
    return grids + _levels(f"{name}, sampled", tokenizer, torch.cat(sampled))


def _levels(name, tokenizer, tokens):
    """A grid for each level of tokens."""
    if isinstance(tokenizer, RVQTokenizer):
        side = round((tokens[0].numel() // tokenizer.config.depth) ** 0.5)
        tokens = tokens.reshape(len(tokens), side, side, tokenizer.config.depth).numpy()
        return [
            TokenGrid(f"{name}, level {level + 1}", tokens[..., level], len(table))
            for level, table in enumerate(tokenizer.codebooks)
        ]
    if isinstance(tokenizer, TokenBridgeTokenizer):
        dimension, levels = tokenizer.config.dimension_order[0], tokenizer.config.levels
        cells = tokens.reshape(len(tokens), -1, len(tokenizer.config.dimension_order))[..., dimension]
        side = round(cells.shape[1] ** 0.5)
        return [TokenGrid(f"{name}, first dimension", cells.reshape(-1, side, side).numpy(), levels)]
    if tokenizer.row_length:
        return [TokenGrid(name, tokens.reshape(len(tokens), 1, -1).numpy(), len(tokenizer.codebook))]
    side = round(tokens[0].numel() ** 0.5)
    return [TokenGrid(name, tokens.reshape(len(tokens), side, side).numpy(), len(tokenizer.codebook))]


def rank_frequencies(grid: TokenGrid, points: int = 40) -> list[tuple[float, float]]:
    """Ranks, and the logarithm to base 10 of how often the code of that rank occurs in a thousand tokens."""
    counts = np.sort(np.bincount(grid.tokens.reshape(-1), minlength=grid.vocabulary))[::-1]
    counts = counts[counts > 0]
    ranks = np.unique(np.geomspace(1, len(counts), points).astype(int))
    return [(float(rank), float(np.log10(1000 * counts[rank - 1] / counts.sum()))) for rank in ranks]
