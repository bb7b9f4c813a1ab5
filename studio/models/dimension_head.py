"""The head of TokenBridge: samples the D numbers of a token one after the other, as an autoregressive classifier.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430), section 3.3. A small
causal transformer runs over the dimensions of one token. What the big transformer says about the token's position
begins the sequence, and modulates every block as in DiT (AdaLN-Zero, arXiv:2212.09748), with a vector of its own added
for each dimension. Parameters carry the authors' names.

In the authors' code the first input gets the vector of the first dimension in sampling but not in training;
`first_step` chooses. Deviation from that code: sampling keeps a cache of keys and values instead of reading all earlier
dimensions again, which changes nothing because a dimension's modulation depends on itself only.
"""

import torch
import torch.nn.functional as F
from torch import nn

from studio.errors import StudioError
from studio.models.kv_cache import KVCache
from studio.models.masked_autoencoder import FeedForward, learned

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

    def forward(self, x, condition, cache, layer):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, cache, layer)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalNorm(nn.Module):
    """A norm without weights, modulated by a condition; here the scale comes before the shift."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=_EPS, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, condition):
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.norm_final(x) * (1 + scale) + shift


class DimensionHead(nn.Module):
    """The transformer over dimensions.

    Args:
        dimensions: numbers of a token D.
        levels: levels of each V.
        condition_dim: width of what the big transformer says.
        dim, depth, num_heads, mlp_ratio: sizes.
        dropout: in the feed-forward, in training.

    Tokens are in the order in which they are sampled. Errors: `StudioError` for a width that does not split into heads.
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
        self.channel_heads = nn.ModuleList(nn.Linear(dim, levels) for _ in range(dimensions))

    def close_gates(self) -> None:
        """Sets all modulation to zero, so that an untrained block passes on what it is given."""
        for block in (*self.channel_blocks, self.channel_final):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
            nn.init.zeros_(block.adaLN_modulation[1].bias)

    def forward(self, states: torch.Tensor, tokens: torch.Tensor, first_step: bool = False) -> torch.Tensor:
        """Logits (n, D, V), float32, of all dimensions, each behind the tokens before it.

        Args:
            states: what the big transformer says about n positions (n, condition_dim).
            tokens: their levels (n, D), int64; the last is not read.
            first_step: whether the first input gets the first dimension's vector, as when sampling.
        """
        said = self.condition_proj(states)
        first = said + self.timesteps_embeddings[0, 0] if first_step else said
        inputs = [first, *(table(tokens[:, index]) for index, table in enumerate(self.token_embeddings))]
        hidden = self._run(torch.stack(inputs, dim=1), said, slice(0, self.dimensions), None)
        return torch.stack([head(hidden[:, index]) for index, head in enumerate(self.channel_heads)], dim=1).float()

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
        self, said: torch.Tensor, previous: torch.Tensor | None, cache: KVCache, first_step: bool
    ) -> torch.Tensor:
        """Logits (n, V), float32, of the dimension that the cache has reached.

        Args:
            said: `condition_proj` of the states, (n, dim).
            previous: the dimension before's levels (n,); None at the first.
            first_step: as of `forward`.
        """
        index = cache.length
        if index > 0:
            entering = self.token_embeddings[index - 1](previous)
        else:
            entering = said + self.timesteps_embeddings[0, 0] if first_step else said
        hidden = self._run(entering[:, None], said, slice(index, index + 1), cache)
        return self.channel_heads[index](hidden[:, 0]).float()

    def _run(self, x, said, dimensions, cache):
        """States (n, d, dim) behind the norms, of inputs x (n, d, dim) at these dimensions."""
        x = x + self.channel_embed[:, dimensions]
        condition = said[:, None] + self.timesteps_embeddings[:, dimensions]
        for layer, block in enumerate(self.channel_blocks):
            x = block(x, condition, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.channel_final(self.channel_norm(x), condition)
