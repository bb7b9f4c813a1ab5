"""The masked autoencoder over image tokens that `mar` and `token_bridge` share.

"Autoregressive Image Generation without Vector Quantization" (arXiv:2406.11838), section 4. The encoder reads a buffer
of class vectors and the visible tokens. The decoder fills the other positions with mask tokens and gives each position
the vector from which a head samples its token. Blocks are those of ViT (arXiv:2010.11929). Parameters carry the
authors' names.

Our addition is text conditioning: with `caption_dim` the buffer holds the projected states of a caption, one a
position. Positions without a state, and the unconditional rows of guidance, hold the null vector. The last states stand
at the end whatever the length, so tokens with which every caption ends have fixed positions. With `plan_size` these are
the region tokens, and the decoder adds region conditioning to each position (`studio.models.region_conditioning`).

Deviations from the authors' code: visible tokens are given by their positions, in any order, instead of a mask; the
last decoder block can compute the wanted positions only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.errors import StudioError
from studio.models.region_conditioning import RegionConditioning, check_region_conditioning

_EPS = 1e-6


def take_rows(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The vectors (B, k, C) of x (B, n, C) at positions (B, k)."""
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))


def both_halves(dim: int, depth: int, heads: int) -> dict[str, int]:
    """Configuration of an encoder and a decoder of equal size."""
    sizes = {"dim": dim, "depth": depth, "heads": heads}
    return {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in sizes.items()}


def learned(*shape: int) -> nn.Parameter:
    """A parameter of this shape, initialised from a Gaussian with standard deviation 0.02."""
    return nn.Parameter(torch.empty(*shape).normal_(std=0.02))


class Attention(nn.Module):
    """Attention of all positions to all, with one fused projection (queries, keys, values)."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout_rate = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, queried: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of x (B, n, dim) to x, or of the vectors `queried` (B, k, dim) of x to x; mask as of `attend`."""
        return self.attend(*self.project(x, queried), mask)

    def project(
        self, x: torch.Tensor, queried: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of x (B, n, dim) or of `queried` (B, k, dim), keys and values of x: each (B, heads, n or k, d)."""
        if queried is None:
            queries, keys, values = (self._heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            queries, (keys, values) = self.queries(queried), self.keys_values(x)
        return queries, keys, values

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Queries alone of x (B, k, dim)."""
        dim = x.shape[-1]
        return self._heads(F.linear(x, self.qkv.weight[:dim], self.qkv.bias[:dim]))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values alone of x (B, n, dim)."""
        dim = x.shape[-1]
        keys, values = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the queries read from keys and values, all as of `project`: (B, k, dim).

        `mask` (B, 1, 1, n) is true where a key may be read; None: everywhere.
        """
        dropout = self.dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = FeedForward(dim, hidden, dropout)

    def forward(
        self, x: torch.Tensor, wanted: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The block's output for x (B, n, dim), or for its positions `wanted` (B, k) only: (B, k, dim).

        `mask` is that of `Attention.attend`, for all positions.
        """
        normed = self.norm1(x)
        if wanted is None:
            return self.finish(x, self.attn(normed, mask=mask))
        return self.finish(take_rows(x, wanted), self.attn(normed, take_rows(normed, wanted)))

    def finish(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The block's output for positions x (B, k, dim) whose attention read `read` (B, k, dim)."""
        x = x + read
        return x + self.mlp(self.norm2(x))


class Masked(NamedTuple):
    """B images that are equally far, under S conditions, in a call of a `MaskedAutoencoder`.

    Args:
        tokens: (B, L, D), of which the visible ones are read.
        visible: positions (B, v), int64.
        wanted: positions (B, k), int64, whose conditions are computed.
        buffer: (S*B, buffer_size, encoder_dim), the B buffers of the first condition, then those of the next.
    """

    tokens: torch.Tensor
    visible: torch.Tensor
    wanted: torch.Tensor
    buffer: torch.Tensor

    @property
    def streams(self) -> int:
        """S."""
        return len(self.buffer) // len(self.tokens)

    def rows(self, of_images: torch.Tensor) -> torch.Tensor:
        """What belongs to images (B, ...), for all rows (S*B, ...)."""
        return of_images.repeat(self.streams, *[1] * (of_images.ndim - 1))


def _padded(positions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Positions (B_i, n_i), one below the other, with zeros behind shorter ones: (B, n)."""
    longest = max(each.shape[1] for each in positions)
    return torch.cat([F.pad(each, (0, longest - each.shape[1])) for each in positions])


class MaskedAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Encoder and decoder, of the sizes in the configuration that a subclass registers.

    These are `grid_size`, `token_dim`, `encoder_dim`, `encoder_depth`, `encoder_heads`, `decoder_dim`, `decoder_depth`,
    `decoder_heads`, `mlp_ratio`, `num_classes`, `buffer_size`, `dropout`, `plan_size`, and `class_dropout` for
    training. A text-conditional model has `num_classes` None and `caption_dim`, the width of text states. A subclass
    defines `head_positions`, position embeddings (1, L, decoder_dim) that are added to the head's conditions.

    Raises:
        StudioError: sizes that do not fit together.
    """

    config: Any

    def __init__(self):
        super().__init__()
        config = self.config
        if config.encoder_dim % config.encoder_heads or config.decoder_dim % config.decoder_heads:
            raise StudioError(
                f"Widths must split into heads: {config.encoder_dim} into {config.encoder_heads}, "
                f"{config.decoder_dim} into {config.decoder_heads}."
            )
        if min(config.encoder_depth, config.decoder_depth) < 1:
            raise StudioError("Encoder and decoder need at least one block each.")
        if (config.num_classes is None) == (config.get("caption_dim") is None):
            raise StudioError("A model is conditioned on classes or on text: give num_classes or caption_dim.")
        text_positions = config.buffer_size if config.num_classes is None else 0
        check_region_conditioning(config.plan_size, config.grid_size, text_positions)
        places = config.buffer_size + self.num_tokens

        def blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(Block(dim, heads, int(dim * config.mlp_ratio), config.dropout) for _ in range(depth))

        if config.num_classes is None:
            self.caption_proj = nn.Linear(config.caption_dim, config.encoder_dim)
        else:
            self.class_emb = nn.Embedding(config.num_classes, config.encoder_dim)
        self.fake_latent = learned(1, config.encoder_dim)
        self.z_proj = nn.Linear(config.token_dim, config.encoder_dim)
        self.z_proj_ln = nn.LayerNorm(config.encoder_dim, eps=_EPS)
        self.encoder_pos_embed_learned = learned(1, places, config.encoder_dim)
        self.encoder_blocks = blocks(config.encoder_dim, config.encoder_depth, config.encoder_heads)
        self.encoder_norm = nn.LayerNorm(config.encoder_dim, eps=_EPS)
        self.decoder_embed = nn.Linear(config.encoder_dim, config.decoder_dim)
        self.mask_token = learned(1, 1, config.decoder_dim)
        self.decoder_pos_embed_learned = learned(1, places, config.decoder_dim)
        self.decoder_blocks = blocks(config.decoder_dim, config.decoder_depth, config.decoder_heads)
        self.decoder_norm = nn.LayerNorm(config.decoder_dim, eps=_EPS)
        if config.plan_size:
            self.plan_embeddings = RegionConditioning(
                config.plan_size, config.grid_size, config.encoder_dim, config.decoder_dim
            )

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def zero_region_conditioning(self) -> None:
        """Sets the weights of region conditioning, if any, to zero: the state at the start of training."""
        if self.config.plan_size:
            nn.init.zeros_(self.plan_embeddings.weight)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image L."""
        return self.config.grid_size**2

    def dropped_rows(self, rows: int) -> torch.Tensor | None:
        """Rows (rows,) bool that get the null vector, each with probability `class_dropout`; None outside training."""
        if not self.training or self.config.class_dropout <= 0:
            return None
        return torch.rand(rows, device=self.device) < self.config.class_dropout

    def embed_condition(
        self,
        *,
        class_labels: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
        caption_mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Embeds the condition as the buffer.

        Args:
            class_labels: classes (B,), for a class-conditional model; a class fills its whole buffer.
            captions: text states (B, T, caption_dim), for a text-conditional model; the buffer holds the last of them.
            caption_mask: (B, T), true at states of text.
            drop: rows (B,) bool that get the null vector.

        Returns:
            The buffer (B, buffer_size, encoder_dim), and None: all of it is valid.
        """
        null, size = self.fake_latent, self.config.buffer_size
        if class_labels is not None:
            vectors = self.class_emb(class_labels)
            if drop is not None:
                vectors = torch.where(drop[:, None], null.to(vectors.dtype), vectors)
            return vectors[:, None].expand(-1, size, -1), None
        assert captions is not None and caption_mask is not None
        text_last = caption_mask.bool().to(torch.uint8).argsort(dim=1, stable=True)[:, -size:]
        shown = caption_mask.bool().gather(1, text_last)
        if drop is not None:
            shown = shown & ~drop[:, None]
        vectors = torch.where(shown[..., None], self.caption_proj(take_rows(captions, text_last)), null)
        before = null.expand(len(vectors), size - vectors.shape[1], -1)
        return torch.cat((before, vectors), dim=1), None

    def encode(
        self, tokens: torch.Tensor, visible: torch.Tensor, buffer: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States (B, buffer_size + v, encoder_dim) of the buffer and the visible tokens.

        Args:
            tokens: (B, L, D), of which the visible ones are read.
            visible: positions (B, v), int64.
            buffer: (B, buffer_size, encoder_dim).
            seen: which of `visible` are meant (B, v) bool, where images have different numbers of them; None: all.
        """
        x, mask = self.encoder_input(tokens, visible, buffer), None
        if seen is not None:
            mask = F.pad(seen, (self.config.buffer_size, 0), value=True)[:, None, None]
        for block in self.encoder_blocks:
            x = block(x, mask=mask)
        return self.encoder_norm(x)

    def encoder_input(self, tokens: torch.Tensor, visible: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """What the first block of `encode` reads; arguments as there."""
        before, places = self.config.buffer_size, self.encoder_pos_embed_learned[0]
        shown = self.z_proj(take_rows(tokens, visible)) + places[before + visible]
        return self.z_proj_ln(torch.cat((buffer + places[:before], shown), dim=1))

    def decode(
        self,
        states: torch.Tensor,
        visible: torch.Tensor,
        wanted: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Conditions (B, k, decoder_dim) of the head.

        Args:
            states: what `encode` returned.
            visible, seen: that it was given.
            wanted: positions (B, k) to compute; all L when None.
        """
        if wanted is None:
            wanted = torch.arange(self.num_tokens, device=states.device).expand(len(states), -1)
        x = self.with_regions(self.decoder_input(states, visible, seen), states)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        return self.head_conditions(self.decoder_blocks[-1](x, self.config.buffer_size + wanted), wanted)

    def decoder_input(
        self, states: torch.Tensor, visible: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All places (B, buffer_size + L, decoder_dim), mask tokens at unknown ones; arguments as of `decode`."""
        places = self.decoder_pos_embed_learned[0]
        known, embedded = self.places_of(visible), self.decoder_embed(states)
        embedded, x = embedded + places[known], (self.mask_token + places).repeat(len(states), 1, 1)
        if seen is None:
            return x.scatter(1, known[:, :, None].expand_as(embedded), embedded)
        known[:, self.config.buffer_size :].masked_fill_(~seen, len(places))  # one place more, for what is not meant
        return F.pad(x, (0, 0, 0, 1)).scatter(1, known[:, :, None].expand_as(embedded), embedded)[:, :-1]

    def places_of(self, visible: torch.Tensor) -> torch.Tensor:
        """Places (B, buffer_size + v) of the buffer and of positions (B, v)."""
        before = self.config.buffer_size
        buffer = torch.arange(before, device=visible.device).expand(len(visible), -1)
        return torch.cat((buffer, before + visible), dim=1)

    def with_regions(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Adds region conditioning, if any, to x of `decoder_input`, from the first `buffer_size` states."""
        if not self.config.plan_size:
            return x
        before = self.config.buffer_size
        return x + F.pad(self.plan_embeddings(states[:, :before]), (0, 0, before, 0))

    def head_conditions(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Conditions of the head from the last block's output x (B, k, decoder_dim) at positions (B, k)."""
        return self.decoder_norm(x) + self.head_positions[0][wanted]

    def conditions(
        self, tokens: torch.Tensor, visible: torch.Tensor, wanted: torch.Tensor, buffer: torch.Tensor
    ) -> torch.Tensor:
        """Conditions (S, B, k, decoder_dim) of the head under S conditions of the same B images, as of `Masked`."""
        [found] = self.conditions_together([Masked(tokens, visible, wanted, buffer)])
        return found

    def conditions_together(self, parts: Sequence[Masked]) -> list[torch.Tensor]:
        """`conditions` of images that are not equally far, in one call."""
        tokens = torch.cat([part.rows(part.tokens) for part in parts])
        visible, wanted = ([part.rows(getattr(part, name)) for part in parts] for name in ("visible", "wanted"))
        buffer, counts = torch.cat([part.buffer for part in parts]), {each.shape[1] for each in visible}
        seen = _padded([torch.ones_like(each, dtype=torch.bool) for each in visible]) if len(counts) > 1 else None
        shown, asked = _padded(visible), _padded(wanted)
        found = self.decode(self.encode(tokens, shown, buffer, seen), shown, asked, seen)
        split = found.split([len(part.buffer) for part in parts])
        return [rows[:, : part.wanted.shape[1]].unflatten(0, (part.streams, -1)) for part, rows in zip(parts, split)]
