"""MAR: a masked autoencoder over continuous image tokens, whose states condition a diffusion-loss head.

"Autoregressive Image Generation without Vector Quantization" (arXiv:2406.11838). The encoder reads a buffer of class
vectors and the visible tokens; the decoder fills the rest with mask tokens and gives each position the vector from
which `diffusion_head` draws its token. Blocks are those of ViT (arXiv:2010.11929). Parameters carry the authors' names.

Scope: the network and its training loss. In which order tokens are drawn is the business of `studio.decoding`.
Deviations from the authors' code: visible tokens are named by their positions, in any order, instead of a mask; the
last decoder block can be told to answer only for the positions that are asked for.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from studio.errors import StudioError
from studio.models.diffusion_head import DiffusionLoss


def _published(dim: int, depth: int, heads: int, head_width: int, head_depth: int) -> dict[str, int]:
    halves = {"dim": dim, "depth": depth, "heads": heads}
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in halves.items()}
    return {**sizes, "head_width": head_width, "head_depth": head_depth}


PRESETS: dict[str, dict[str, int]] = {
    "B": _published(768, 12, 12, 1024, 6),
    "L": _published(1024, 16, 16, 1280, 8),
    "H": _published(1280, 20, 16, 1536, 12),
}
_EPS = 1e-6


def take_rows(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The vectors (B, k, C) of x (B, n, C) at positions (B, k)."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Latents (B, C, H, W) to tokens (B, H/p * W/p, C*p*p); a token holds whole channels one after the other."""
    blocks = latents.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Tokens (B, n*n, C*p*p) of a square grid to latents (B, C, n*p, n*p): the inverse of `patchify`."""
    side = round(tokens.shape[1] ** 0.5)
    blocks = tokens.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, (side, side))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Attention(nn.Module):
    """Attention of all positions to all, with one fused projection (queries, keys, values)."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout_rate = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x, asking=None):
        """Of x (B, n, dim); with `asking` (B, k, dim), vectors of x, only theirs."""
        if asking is None:
            queries, keys, values = self.qkv(x).chunk(3, dim=-1)
        else:
            dim = x.shape[-1]
            queries = F.linear(asking, self.qkv.weight[:dim], self.qkv.bias[:dim])
            keys, values = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
        mixed = F.scaled_dot_product_attention(*heads, dropout_p=self.dropout_rate if self.training else 0.0)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = FeedForward(dim, hidden, dropout)

    def forward(self, x, wanted=None):
        """Of x (B, n, dim); with `wanted` (B, k) positions, only their vectors (B, k, dim)."""
        normed = self.norm1(x)
        if wanted is None:
            x = x + self.attn(normed)
        else:
            x = take_rows(x, wanted) + self.attn(normed, take_rows(normed, wanted))
        return x + self.mlp(self.norm2(x))


class MAR(ModelMixin, ConfigMixin):
    """The network.

    Args:
        grid_size: tokens a side; a picture has L = grid_size**2.
        token_dim: numbers of a token D: latent channels times patch_size**2.
        patch_size: side of the blocks of latents that make a token.
        encoder_dim, encoder_depth, encoder_heads, decoder_dim, decoder_depth, decoder_heads, mlp_ratio: sizes.
        num_classes: classes without the null class.
        buffer_size: places before the tokens that hold the class.
        head_width, head_depth: of the diffusion-loss head.
        latent_scale: by which latents were multiplied before they became tokens.
        class_dropout: share of classes replaced by the null class in training.
        dropout: in attention and feed-forward, in training.

    Errors: `StudioError` for sizes that do not fit together.
    """

    _no_split_modules = ["Block", "ResidualBlock"]

    @register_to_config
    def __init__(
        self,
        grid_size: int = 16,
        token_dim: int = 16,
        patch_size: int = 1,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        buffer_size: int = 64,
        head_width: int = 1024,
        head_depth: int = 6,
        latent_scale: float = 0.2325,
        class_dropout: float = 0.1,
        dropout: float = 0.1,
    ):
        super().__init__()
        if encoder_dim % encoder_heads or decoder_dim % decoder_heads:
            raise StudioError(
                f"Widths must split into heads: {encoder_dim} into {encoder_heads}, {decoder_dim} into {decoder_heads}."
            )
        if token_dim % patch_size**2:
            raise StudioError(f"token_dim {token_dim} must be a multiple of patch_size**2, {patch_size**2}.")
        if min(encoder_depth, decoder_depth) < 1:
            raise StudioError("Encoder and decoder need a block at least.")
        places = buffer_size + grid_size**2

        def blocks(dim, depth, heads):
            return nn.ModuleList(Block(dim, heads, int(dim * mlp_ratio), dropout) for _ in range(depth))

        def learned(*shape):
            return nn.Parameter(torch.empty(*shape).normal_(std=0.02))

        self.class_emb = nn.Embedding(num_classes, encoder_dim)
        self.fake_latent = learned(1, encoder_dim)
        self.z_proj = nn.Linear(token_dim, encoder_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_dim, eps=_EPS)
        self.encoder_pos_embed_learned = learned(1, places, encoder_dim)
        self.encoder_blocks = blocks(encoder_dim, encoder_depth, encoder_heads)
        self.encoder_norm = nn.LayerNorm(encoder_dim, eps=_EPS)
        self.decoder_embed = nn.Linear(encoder_dim, decoder_dim)
        self.mask_token = learned(1, 1, decoder_dim)
        self.decoder_pos_embed_learned = learned(1, places, decoder_dim)
        self.decoder_blocks = blocks(decoder_dim, decoder_depth, decoder_heads)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=_EPS)
        self.diffusion_pos_embed_learned = learned(1, grid_size**2, decoder_dim)
        self.apply(self._init_weights)
        self.diffloss = DiffusionLoss(token_dim, decoder_dim, head_width, head_depth)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def preset(cls, name: str, **overrides) -> "MAR":
        """A published size, "B", "L" or "H", for 256 pixels: 16x16 tokens of 16 numbers, ImageNet classes."""
        if name not in PRESETS:
            raise StudioError(f"There is no MAR size {name!r}; the sizes are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def num_tokens(self) -> int:
        """Tokens of one picture L."""
        return self.config.grid_size**2

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) as a variational autoencoder makes them to tokens (B, L, D)."""
        return patchify(latents * self.config.latent_scale, self.config.patch_size)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) to latents (B, C, H, W) for the decoder of a variational autoencoder."""
        return unpatchify(tokens, self.config.patch_size) / self.config.latent_scale

    def embed_condition(
        self, *, class_labels: torch.Tensor, drop: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """The buffer (B, buffer_size, encoder_dim) of classes (B,), and None: all of it is valid.

        `drop` (B,) bool marks rows that get the null class.
        """
        vectors = self.class_emb(class_labels)
        if drop is not None:
            vectors = torch.where(drop[:, None], self.fake_latent.to(vectors.dtype), vectors)
        return vectors[:, None].expand(-1, self.config.buffer_size, -1), None

    def encode(self, tokens: torch.Tensor, visible: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """States (B, buffer_size + v, encoder_dim) of the buffer and the visible tokens.

        Args:
            tokens: (B, L, D); those that are not visible are not read.
            visible: positions (B, v), int64.
            buffer: (B, buffer_size, encoder_dim).
        """
        before, places = self.config.buffer_size, self.encoder_pos_embed_learned[0]
        shown = self.z_proj(take_rows(tokens, visible)) + places[before + visible]
        x = self.z_proj_ln(torch.cat((buffer + places[:before], shown), dim=1))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, states: torch.Tensor, visible: torch.Tensor, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Conditions (B, k, decoder_dim) for the head, of the wanted positions (B, k); of all L if None.

        `states` and `visible` are those of `encode`.
        """
        before, places = self.config.buffer_size, self.decoder_pos_embed_learned[0]
        if wanted is None:
            wanted = torch.arange(self.num_tokens, device=states.device).expand(len(states), -1)
        buffer = torch.arange(before, device=states.device).expand(len(states), -1)
        known = torch.cat((buffer, before + visible), dim=1)
        x = (self.mask_token + places).repeat(len(states), 1, 1)
        embedded = self.decoder_embed(states)
        x = x.scatter(1, known[:, :, None].expand_as(embedded), embedded + places[known])
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, before + wanted)
        return self.decoder_norm(x) + self.diffusion_pos_embed_learned[0][wanted]

    def conditions(
        self, tokens: torch.Tensor, visible: torch.Tensor, wanted: torch.Tensor, buffer: torch.Tensor
    ) -> torch.Tensor:
        """Conditions (S, B, k, decoder_dim) for the head, of the wanted positions (B, k).

        `buffer` (S*B, buffer_size, encoder_dim) holds S conditions of the same B pictures, one set after the other.
        """
        streams = len(buffer) // len(tokens)
        tokens, visible, wanted = (part.repeat(streams, *[1] * (part.ndim - 1)) for part in (tokens, visible, wanted))
        return self.decode(self.encode(tokens, visible, buffer), visible, wanted).unflatten(0, (streams, -1))

    def forward(
        self,
        tokens: torch.Tensor,
        order: torch.Tensor,
        masked: int,
        *,
        class_labels: torch.Tensor,
        drop: torch.Tensor | None = None,
        repeats: int = 4,
    ) -> torch.Tensor:
        """The training loss, a number: that of the head, over the first `masked` positions of each order (B, L).

        Args:
            tokens: (B, L, D).
            class_labels: (B,).
            drop: (B,) rows with the null class; in training mode drawn with probability `class_dropout` if None.
            repeats: times and noises that each token is tried with.
        """
        if drop is None and self.training and self.config.class_dropout > 0:
            drop = torch.rand(len(tokens), device=tokens.device) < self.config.class_dropout
        buffer, _ = self.embed_condition(class_labels=class_labels, drop=drop)
        hidden, visible = order[:, :masked], order[:, masked:]
        conditions = self.decode(self.encode(tokens, visible, buffer), visible, hidden).flatten(0, 1)
        targets = take_rows(tokens, hidden).flatten(0, 1)
        return self.diffloss(targets.repeat(repeats, 1), conditions.repeat(repeats, 1)).mean()
