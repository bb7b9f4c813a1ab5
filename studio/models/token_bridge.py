"""TokenBridge: a masked autoencoder over quantised latents, with a head that samples a token dimension by dimension.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430), section 3.3. The
transformer of `masked_autoencoder` reads the values of tokens. The head is a small causal transformer over the D
dimensions of one token, an autoregressive classifier: the state of the token's position begins the sequence and
modulates every block as in DiT (AdaLN-Zero, arXiv:2212.09748), with a vector of its own added for each dimension.
Parameters carry the authors' names, those of the head behind `head.`.

In the authors' code the first input of the head gets the vector of the first dimension in sampling but not in training;
`first_step` chooses. Deviation from that code: sampling keeps a cache of keys and values instead of reading all earlier
dimensions again. The result is the same, because a dimension's modulation depends on itself only.

Scope: the network and its training loss. `studio.decoding.token_bridge` samples tokens. The network holds no levels:
the values of tokens come with each call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.checks import shown
from studio.errors import StudioError
from studio.models.fourier_head import FourierHead
from studio.models.kv_cache import KVCache
from studio.models.masked_autoencoder import FeedForward, MaskedAutoencoder, both_halves, learned, take_rows

PRESETS: dict[str, dict[str, int]] = {
    "B": {**both_halves(768, 12, 12), "head_width": 768, "head_depth": 4},
    "L": {**both_halves(1024, 16, 16), "head_width": 1024, "head_depth": 4},
    "H": {**both_halves(1280, 20, 16), "head_width": 1024, "head_depth": 6},
}


_EPS = 1e-6


class Attention(nn.Module):
    """Causal self-attention with normed queries and keys."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // num_heads, eps=_EPS) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, cache: KVCache | None, layer: int) -> torch.Tensor:
        """x (n, d, dim), behind what the cache holds."""
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        if cache is not None:
            keys, values = cache.update(layer, torch.stack((keys, values), dim=1))
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=cache is None)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by a condition."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=_EPS) for _ in range(2))
        self.attn = Attention(dim, num_heads)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, cache: KVCache | None, layer: int) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, cache, layer)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalNorm(nn.Module):
    """A norm without weights, modulated by a condition; here the scale comes before the shift."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=_EPS, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.norm_final(x) * (1 + scale) + shift


class DimensionHead(nn.Module):
    """The transformer over dimensions.

    Args:
        dimensions: numbers of a token D.
        levels: levels of each V.
        condition_dim: width of the big transformer's states.
        dim, depth, num_heads, mlp_ratio: sizes.
        dropout: in the feed-forward, in training.
        frequencies: of a Fourier head (`studio.models.fourier_head`) for each dimension; 0: linear output layers.

    Dimensions are in the order in which they are sampled.

    Raises:
        StudioError: a width that does not split into heads.
    """

    def __init__(
        self,
        dimensions: int,
        levels: int,
        condition_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        frequencies: int = 0,
    ):
        super().__init__()
        if dim % num_heads:
            raise StudioError(f"The head's width {dim} must split into {num_heads} heads.")
        self.dimensions, self.depth, self.num_heads, self.dim = dimensions, depth, num_heads, dim
        self.condition_proj = nn.Linear(condition_dim, dim)
        self.timesteps_embeddings = learned(1, dimensions, dim)
        self.channel_embed = learned(1, dimensions, dim)
        self.token_embeddings = nn.ModuleList(nn.Embedding(levels, dim) for _ in range(dimensions - 1))
        self.channel_blocks = nn.ModuleList(Block(dim, num_heads, int(dim * mlp_ratio), dropout) for _ in range(depth))
        self.channel_norm = nn.LayerNorm(dim, eps=_EPS)
        self.channel_final = FinalNorm(dim)
        self.channel_heads = nn.ModuleList(
            FourierHead(dim, levels, frequencies) if frequencies else nn.Linear(dim, levels) for _ in range(dimensions)
        )

    def close_gates(self) -> None:
        """Sets all modulations to zero, so that an untrained block returns its input."""
        for block in (*self.channel_blocks, self.channel_final):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            nn.init.zeros_(block.adaLN_modulation[1].bias)

    def forward(self, states: torch.Tensor, tokens: torch.Tensor, first_step: bool = False) -> torch.Tensor:
        """Logits (n, D, V), float32, of all dimensions, each behind the tokens before it.

        Args:
            states: the big transformer's states of n positions (n, condition_dim).
            tokens: their levels (n, D), int64; the last dimension is not read.
            first_step: whether the first input gets the first dimension's vector, as when sampling.
        """
        hidden = self.hidden(states, tokens, first_step)
        return torch.stack([head(hidden[:, index]) for index, head in enumerate(self.channel_heads)], dim=1).float()

    def hidden(self, states: torch.Tensor, tokens: torch.Tensor, first_step: bool = False) -> torch.Tensor:
        """What the output layers read (n, D, dim); arguments as of `forward`."""
        condition = self.condition_proj(states)
        first = condition + self.timesteps_embeddings[0, 0] if first_step else condition
        inputs = [first, *(table(tokens[:, index]) for index, table in enumerate(self.token_embeddings))]
        return self._run(torch.stack(inputs, dim=1), condition, slice(0, self.dimensions), None)

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for `rows` positions."""
        like = self.condition_proj.weight
        return KVCache(
            num_layers=self.depth,
            rows=rows,
            num_kv_heads=self.num_heads,
            max_length=self.dimensions,
            head_dim=self.dim // self.num_heads,
            dtype=like.dtype,
            device=like.device,
        )

    def next_logits(
        self, condition: torch.Tensor, previous: torch.Tensor | None, cache: KVCache, first_step: bool
    ) -> torch.Tensor:
        """Logits (n, V), float32, of the dimension that the cache has reached.

        Args:
            condition: `condition_proj` of the states, (n, dim).
            previous: levels (n,) of the dimension before; None at the first dimension.
            first_step: as of `forward`.
        """
        index = cache.length
        if index > 0:
            entering = self.token_embeddings[index - 1](previous)
        else:
            entering = condition + self.timesteps_embeddings[0, 0] if first_step else condition
        hidden = self._run(entering[:, None], condition, slice(index, index + 1), cache)
        return self.channel_heads[index](hidden[:, 0]).float()

    def _run(self, x: torch.Tensor, condition: torch.Tensor, dimensions: slice, cache: KVCache | None) -> torch.Tensor:
        """States (n, d, dim) behind the norms, of inputs x (n, d, dim) at these dimensions."""
        x = x + self.channel_embed[:, dimensions]
        modulation = condition[:, None] + self.timesteps_embeddings[:, dimensions]
        for layer, block in enumerate(self.channel_blocks):
            x = block(x, modulation, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.channel_final(self.channel_norm(x), modulation)


class TokenBridge(MaskedAutoencoder, ModelMixin):  # type: ignore[misc]  # both bases define config_name
    """The network. (diffusers looks for the name `ModelMixin` in the module of a pipeline's component.)

    Args:
        grid_size: cells a side; an image has L = grid_size**2 of them.
        token_dim: tokens of a cell D, the tokenizer's dimensions.
        levels: of each dimension V.
        dimension_order: order in which the dimensions are sampled, a permutation; 0 to D - 1 when None.
        encoder_dim, encoder_depth, encoder_heads, decoder_dim, decoder_depth, decoder_heads, mlp_ratio: sizes.
        head_width, head_depth, head_heads: of the transformer over dimensions.
        head_frequencies: of the Fourier heads of its dimensions; 0: linear ones, as in released weights.
        num_classes: classes without the null class; None for a text-conditional model.
        caption_dim: width of the text states; None for a class-conditional model.
        caption_length: text tokens of a caption; the buffer holds the last `buffer_size` of them.
        buffer_size: positions before the cells that hold the class or the caption.
        sampling_first_input_adds_step_embedding: whether the head's first input gets the first dimension's vector in
            sampling, which it does not get in training, as in the authors' published runs.
        plan_size: regions a side for region conditioning (`studio.models.region_conditioning`), a divisor of
            `grid_size`; the last `plan_size**2` text states are those of the regions in raster order. 0: none, as in
            released weights.
        class_dropout: probability that the null vector replaces a condition in training.
        dropout: in attention and feed-forward, in training.

    Raises:
        StudioError: sizes that do not fit together.
    """

    _no_split_modules = ["Block"]  # type: ignore[assignment]  # None in diffusers

    @register_to_config
    def __init__(
        self,
        grid_size: int = 16,
        token_dim: int = 16,
        levels: int = 64,
        dimension_order: tuple[int, ...] | None = None,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        head_width: int = 768,
        head_depth: int = 4,
        head_heads: int = 8,
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        caption_length: int = 32,
        buffer_size: int = 64,
        sampling_first_input_adds_step_embedding: bool = True,
        class_dropout: float = 0.1,
        dropout: float = 0.1,
        plan_size: int = 0,
        head_frequencies: int = 0,
    ):
        super().__init__()
        order = list(range(token_dim)) if dimension_order is None else list(dimension_order)
        if sorted(order) != list(range(token_dim)):
            raise StudioError(f"dimension_order must hold each of 0 to {token_dim - 1} once, not {order}.")
        self.register_to_config(dimension_order=order)
        self.output_pos_embed = learned(1, grid_size**2, decoder_dim)
        self.head = DimensionHead(
            token_dim, levels, decoder_dim, head_width, head_depth, head_heads, mlp_ratio, dropout, head_frequencies
        )
        self.apply(self._init_weights)
        self.zero_region_conditioning()
        self.head.close_gates()
        for layer in self.head.channel_heads:
            if isinstance(layer, FourierHead):
                layer.reset_parameters()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TokenBridge":
        """A model of a published size, "B", "L" or "H": 256 pixels, 16x16 cells of 16 tokens, ImageNet classes.

        Raises:
            StudioError: an unknown name.
        """
        if name not in PRESETS:
            raise StudioError(f"There is no TokenBridge size {shown(name)}; the sizes are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_positions(self) -> nn.Parameter:
        """Position embeddings (1, L, decoder_dim), added to the head's conditions."""
        return self.output_pos_embed

    @property
    def order(self) -> torch.Tensor:
        """The dimensions in the order of sampling, (D,) int64."""
        return torch.tensor(self.config.dimension_order, device=self.device)

    def forward(
        self,
        tokens: torch.Tensor,
        values: torch.Tensor,
        order: torch.Tensor,
        masked: int,
        *,
        asked: int | None = None,
        drop: torch.Tensor | None = None,
        **condition: torch.Tensor,
    ) -> torch.Tensor:
        """The training loss (scalar): cross-entropy over the dimensions of the masked cells.

        Args:
            tokens: levels (B, L, D), int64, in the tokenizer's order of dimensions.
            values: their values (B, L, D).
            order: a permutation of the cells for each image, (B, L), int64.
            masked: how many cells are masked, the first of each order.
            asked: how many of the masked cells enter the loss, the first of each order; all when None. The head reads
                every dimension of a cell, so fewer cells are much faster.
            drop: rows (B,) that get the null vector; in training mode sampled with probability `class_dropout` if None.
            condition: as of `embed_condition`.
        """
        drop = self.dropped_rows(len(tokens)) if drop is None else drop
        buffer, _ = self.embed_condition(**condition, drop=drop)
        hidden, visible = order[:, :masked], order[:, masked:]
        states = self.decode(self.encode(values, visible, buffer), visible, hidden[:, :asked]).flatten(0, 1)
        targets = take_rows(tokens, hidden[:, :asked]).flatten(0, 1)[:, self.order]
        return F.cross_entropy(self.head(states, targets).flatten(0, 1), targets.flatten())
