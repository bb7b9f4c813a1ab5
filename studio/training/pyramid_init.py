"""Where a One-D-Piece tokenizer starts: its row of tokens as a pyramid over the image, coarse to fine.

From random weights the queries of a row are all alike, and training takes long until the late ones carry anything.
Here the untrained network already is a codec. Half of every vector tells a place, by random Fourier features, and is
all that attention compares, so that near places read each other ("Mimetic Initialization of Self-Attention Layers",
arXiv:2305.09828, goes the same way); the other half holds principal components of patches, which attention copies. The
two layers at the bottleneck and the last one are fitted to images by linear algebra. Tokens that stand for the same
cell as one before them turn to the next components.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from studio.training.row_map_init import add_map_of_marked

NEAR = 1.3
"""Scale of queries and keys: how sharply attention keeps to near places."""

KIND = 4.0
"""What tells those that are to be read from the others, beside numbers of about one that tell places."""

MARK = -2
"""Which number of a vector marks tokens that stand for a cell once more; for all others it is zero."""

COPIED = 0.7
"""Share of what is attended to that a block adds."""

STRENGTH = 0.3
"""Standard deviation of the strongest component of a patch, beside places of about one."""

CONSTANT = 3.0
"""A number in every token beside components of variance one at most: unit vectors then keep how strong these are."""

NOISE = 0.02
"""Share of the random start that is kept, so that no two units are alike."""

RIDGE = 1e-3
"""Of the least squares, over the mean variance of what is read."""


def pyramid(side: int, count: int) -> torch.Tensor:
    """Which cells of a grid each of a row of tokens stands for: shares (count, side^2) that sum to one.

    Grids of 2, 4, ... up to `side` cells a side, then cells of the finest grid once more, each grid from its centre
    outwards.
    """
    levels = [_level(cells, side) for cells in _grids(side)]
    return torch.cat(levels + [levels[-1]] * math.ceil(count / len(levels[-1])))[:count]


@torch.no_grad()
def init_as_pyramid(tokenizer: Any, images: torch.Tensor) -> None:
    """Writes that start into a `OneDPieceTokenizer` with the pixel stage "patches", codes from the images too.

    Args:
        images: images (B, channels, side, side) in [-1, 1] to fit to.
    """
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    shares = pyramid(encoder.side, tokenizer.config.num_tokens)
    again = slice(sum(cells**2 for cells in _grids(encoder.side)), None)
    for part, read in ((encoder, "grid"), (decoder, "tokens")):
        _places(part, shares, read)
        part.latent_token_positional_embedding[again, MARK] = KIND
        for block in part.transformer:
            _read_the_near(block)
    _components(encoder, images)
    components, places = tokenizer.latent_tokens.chunk(2, dim=1)
    components.normal_(std=NOISE)
    places.zero_()
    strengths, directions = _bottleneck(tokenizer, images)
    if len(shares[again]):
        _turn_to_the_next(tokenizer, images, again, strengths, directions)
    vectors = F.normalize(tokenizer.encode_features(images), dim=-1).flatten(0, 1)
    tokenizer.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[: tokenizer.config.codebook_size]])
    _last_layer(tokenizer, images)


def _grids(side):
    cells = [side]
    while cells[0] % 2 == 0 and cells[0] > 2:
        cells.insert(0, cells[0] // 2)
    return cells


def _level(cells, side):
    """Shares (cells^2, side^2) of a grid of `cells` a side over one of `side`, from the centre outwards."""
    rows = torch.eye(cells).repeat_interleave(side // cells, dim=1) * (cells / side)
    shares = torch.einsum("ai,bj->abij", rows, rows).flatten(2).flatten(0, 1)
    place = torch.arange(cells) - (cells - 1) / 2
    return shares[(place[:, None] ** 2 + place**2).flatten().argsort(stable=True)]


def _places(part, shares, read):
    """Places in the second half of every position, of patches and, as means of those, of tokens; the last number is
    positive for those that are to be read.
    """
    width = part.positional_embedding.shape[1]
    place = torch.arange(part.side, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(place, place, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = grid @ (torch.randn(2, width // 4 - 1) * 2**0.5)  # products of waves fall to 1/e from one cell to the next
    waves = torch.cat((angles.cos(), angles.sin()), dim=1) * 2**0.5
    means = shares @ waves
    means = means * (waves.norm(dim=1).mean() / means.norm(dim=1, keepdim=True))
    tables = {"grid": (part.positional_embedding[1:], waves), "tokens": (part.latent_token_positional_embedding, means)}
    for name, (table, places) in tables.items():
        table.zero_()
        table[:, width // 2 : width // 2 + places.shape[1]] = places
        table[:, -1] = KIND if name == read else -KIND


def _read_the_near(block):
    """Queries and keys that compare places, values and outputs that copy components, and an MLP that adds little."""
    attention = block.attn
    width = attention.in_proj_weight.shape[1]
    half, size = width // 2, width // attention.heads
    query, key, value = attention.in_proj_weight.view(3, width, width)
    attention.in_proj_weight.mul_(NOISE)
    for head in query.view(attention.heads, size, width):
        nn.init.orthogonal_(head[:-1, half:MARK], gain=NEAR)
    key.copy_(query)
    key[size - 1 :: size, -1] = 1
    attention.in_proj_bias[size - 1 : width : size] = size**0.5
    nn.init.orthogonal_(value[:, :half])
    attention.out_proj.weight.mul_(NOISE)
    attention.out_proj.weight[:half] += COPIED * value[:, :half].T
    block.mlp.c_proj.weight.mul_(NOISE)
    block.mlp.c_proj.bias.zero_()


def _components(encoder, images):
    """Principal components of patches into the first half of what is embedded."""
    conv = encoder.patch_embed
    patches = F.unfold((images + 1) / 2, conv.kernel_size, stride=conv.stride).transpose(1, 2).flatten(0, 1)
    mean, (strengths, components) = patches.mean(0), _principal(patches)
    half = conv.weight.shape[0] // 2
    count = min(half, len(components))
    conv.weight.zero_()
    conv.bias.zero_()
    conv.weight[:count] = (components[:count] * (STRENGTH / strengths[0])).view(count, *conv.weight.shape[1:])
    conv.bias[:count] = -(conv.weight[:count].flatten(1) @ mean)


def _principal(rows):
    """Standard deviations (d), the largest first, and directions (d, d) of the principal components of rows (n, d)."""
    variances, directions = torch.linalg.eigh(torch.cov(rows.T))
    return variances.flip(0).clamp(min=1e-12).sqrt(), directions.flip(1).T


def _bottleneck(tokenizer, images):
    """Tokens hold a constant and the strongest components of what the queries have read; the decoder embeds these.

    Returns all components, as `_principal`.
    """
    encoder, embed = tokenizer.encoder, tokenizer.decoder.decoder_embed
    read = encoder((images + 1) / 2, tokenizer.latent_tokens)
    half, kept = read.shape[2] // 2, tokenizer.config.code_dim - 1
    flat = read[..., :half].flatten(0, 1)
    strengths, directions = _principal((read - read.mean(0))[..., :half].flatten(0, 1))
    conv = encoder.conv_out
    conv.weight.zero_()
    conv.bias.zero_()
    conv.weight[:kept, :half, 0, 0] = directions[:kept] / strengths[0]
    conv.bias[:kept] = -(conv.weight[:kept, :half, 0, 0] @ flat.mean(0))
    conv.bias[kept] = CONSTANT
    embed.weight.zero_()
    embed.bias.zero_()
    embed.weight[: kept + 1, : kept + 1] = torch.eye(kept + 1)
    return strengths, directions


def _turn_to_the_next(tokenizer, images, again, strengths, directions):
    """Tokens `again` hold the components behind those that the bottleneck keeps, as strong as these; in the decoder
    they move to where nothing else is.
    """
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    half, kept = len(strengths), tokenizer.config.code_dim - 1
    count = min(kept, half - kept)
    kept_ones, next_ones = directions[:count], directions[kept : kept + count] * (strengths[0] / strengths[kept])
    turned = kept_ones.new_zeros(2 * half, 2 * half)
    turned[:half, :half] = kept_ones.T @ (next_ones - kept_ones)
    tokens = torch.arange(-tokenizer.config.num_tokens, 0)[again]
    add_map_of_marked(encoder.transformer[-1], turned, MARK, tokens, lambda: tokenizer.encode_features(images))
    held = torch.arange(min(kept + 1, half - kept - 1))
    moved = torch.zeros_like(turned)
    moved[held + kept + 1, held], moved[held, held] = 1, -1
    vectors = F.normalize(tokenizer.encode_features(images), dim=-1)
    add_map_of_marked(decoder.transformer[0], moved, MARK, tokens, lambda: tokenizer.decode_features(vectors))


def _last_layer(tokenizer, images):
    """Pixels by least squares from what the layer before the last says."""
    last, read = tokenizer.decoder.ffn[-1], []
    handle = last.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    tokenizer.decode_features(tokenizer.quantize.lookup(tokenizer.encode(images)).transpose(1, 2))
    handle.remove()
    inputs = read[0].movedim(1, -1).flatten(0, 2)
    size = tokenizer.config.patch_size
    wanted = F.pixel_unshuffle((images + 1) / 2, size).movedim(1, -1).flatten(0, 2)
    means = inputs.mean(0), wanted.mean(0)
    inputs, wanted = inputs - means[0], wanted - means[1]
    gram = inputs.T @ inputs
    gram += RIDGE * gram.trace() / len(gram) * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, inputs.T @ wanted)
    last.weight.copy_(solution.T[:, :, None, None])
    last.bias.copy_(means[1] - means[0] @ solution)
