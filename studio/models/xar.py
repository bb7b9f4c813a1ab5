"""xAR: a transformer that gives the velocity of a flow for one cell of continuous tokens after the other.

"Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv:2502.20388), section 3. The latents
of an image are cells of k x k tokens. A cell attends to itself and to earlier cells. In training every cell has a time
and noise of its own, so earlier cells are noisy too (Noisy Context Learning) and all cells learn in one pass. Time and
class modulate every block (AdaLN, arXiv:2212.09748), cell by cell.

Our addition is text conditioning: the projected states of a caption are a prefix that all cells attend to, their mean
takes the place of the class vector, and with `plan_size` every token also gets the vector of its region.

Scope: the network and its training loss. `studio.decoding.xar` samples tokens. The parameters carry names of our own:
the layout of the released files could not be seen, so there is no converter yet.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.errors import StudioError
from studio.models.diffusion_head import TimeEmbedder
from studio.models.kv_cache import KVCache
from studio.models.llama_blocks import FeedForward, left_pad, rope_table, rotate
from studio.models.masked_autoencoder import learned
from studio.models.region_conditioning import RegionConditioning, check_region_conditioning

TIMES = 1000
"""Times are embedded as whole numbers below this."""
_EPS = 1e-6
_ROPE_BASE = 10000.0


class Condition(NamedTuple):
    """An embedded condition of B rows.

    Attributes:
        vector: (B, dim), added to the embedding of the time.
        prefix: (B, T, dim), attended to by all cells; T is 0 for classes.
        valid: (B, T), false at padding and in unconditional rows.
        regions: (B, L, dim), added to the inputs, or None.
    """

    vector: torch.Tensor
    prefix: torch.Tensor
    valid: torch.Tensor
    regions: torch.Tensor | None


class Block(nn.Module):
    """Attention and SwiGLU behind norms without weights, each modulated and gated."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.mlp = FeedForward(dim, 8 * dim // 3, dropout)
        modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        self.modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        rope: torch.Tensor,
        mask: torch.Tensor | None,
        cache: KVCache | None,
        layer: int,
    ) -> torch.Tensor:
        """x (B, n, dim) under conditions (B, n, dim); `mask` as of `scaled_dot_product_attention`."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1))
            for part in self.qkv(_norm(x) * (1 + scale_a) + shift_a).chunk(3, -1)
        )
        queries, keys = (rotate(part, rope).transpose(1, 2) for part in (queries, keys))
        values = values.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(layer, torch.stack((keys, values), dim=1))
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = x + gate_a * self.proj(mixed.transpose(1, 2).flatten(2))
        return x + gate_m * self.mlp(_norm(x) * (1 + scale_m) + shift_m)


class XAR(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """The network.

    Args:
        grid_size: latents a side; an image has L = grid_size**2 tokens.
        token_dim: numbers of a token D, the channels of the latents.
        cell_size: tokens a side of a cell, a divisor of `grid_size`; as large as it, the model is a plain flow.
        dim, depth, num_heads: sizes; the depth is even.
        num_classes: classes without the null class; None for a text-conditional model.
        caption_dim: width of the text states; None for a class-conditional model.
        caption_length: text tokens of a caption.
        latent_scale: factor by which latents are multiplied before they become tokens.
        plan_size: regions a side for region conditioning (`studio.models.region_conditioning`); 0: none.
        class_dropout: probability that a condition is left out in training.
        dropout: in the feed-forward, in training.

    Raises:
        StudioError: sizes that do not fit together.
    """

    config: Any

    _no_split_modules = ["Block"]  # type: ignore[assignment]  # None in diffusers

    @register_to_config
    def __init__(
        self,
        grid_size: int = 16,
        token_dim: int = 16,
        cell_size: int = 8,
        dim: int = 768,
        depth: int = 16,
        num_heads: int = 12,
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        caption_length: int = 32,
        latent_scale: float = 0.2325,
        plan_size: int = 0,
        class_dropout: float = 0.1,
        dropout: float = 0.1,
    ):
        super().__init__()
        if grid_size % cell_size:
            raise StudioError(f"Cells of {cell_size} do not divide a grid of {grid_size} tokens a side.")
        if depth % 2 or dim % num_heads or (dim // num_heads) % 4:
            raise StudioError(
                f"xAR has an even depth, and a width that splits into heads of a multiple of 4; got {depth} and {dim} "
                f"over {num_heads}."
            )
        if (num_classes is None) == (caption_dim is None):
            raise StudioError("A model is conditioned on classes or on text: give num_classes or caption_dim.")
        check_region_conditioning(plan_size, grid_size, caption_length if caption_dim else None)
        if caption_dim is not None:
            self.caption_proj = nn.Linear(caption_dim, dim)
        if num_classes is not None:
            self.class_emb = nn.Embedding(num_classes, dim)
        self.null = learned(1, dim)
        self.time_embed = TimeEmbedder(dim)
        self.inputs = nn.ModuleList((nn.Linear(token_dim, dim), nn.Linear(dim, dim)))
        self.places = nn.ParameterList(learned(1, grid_size**2, dim) for _ in range(2))
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout) for _ in range(depth))
        self.output = nn.Linear(dim, token_dim)
        self._table: tuple[tuple, torch.Tensor] | None = None
        if plan_size:
            self.plan_embeddings = RegionConditioning(plan_size, grid_size, dim)
            nn.init.zeros_(self.plan_embeddings.weight)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image L."""
        return self.config.grid_size**2

    @property
    def cell_tokens(self) -> int:
        """Tokens of a cell."""
        return self.config.cell_size**2

    @property
    def num_cells(self) -> int:
        """Cells of one image N."""
        return self.num_tokens // self.cell_tokens

    def cell_order(self) -> torch.Tensor:
        """Raster positions (L,) of the tokens, cell by cell; cells, and tokens inside, in raster order."""
        side, inside = self.config.grid_size, self.config.cell_size
        grid = torch.arange(side**2, device=self.device).view(side // inside, inside, side // inside, inside)
        return grid.transpose(1, 2).flatten()

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, H, W) of a variational autoencoder to tokens (B, L, D), cell by cell."""
        return (latents * self.config.latent_scale).flatten(2).transpose(1, 2)[:, self.cell_order()]

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) to latents (B, D, H, W) for the decoder of a variational autoencoder."""
        raster = torch.empty_like(tokens).index_copy_(1, self.cell_order(), tokens)
        side = self.config.grid_size
        return raster.transpose(1, 2).unflatten(2, (side, side)) / self.config.latent_scale

    def embed_condition(
        self,
        *,
        class_labels: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
        caption_mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> Condition:
        """Embeds classes (B,), or text states (B, T, caption_dim) with their mask (B, T); `drop` (B,) rows get none."""
        if class_labels is not None:
            vector, rows = self.class_emb(class_labels), len(class_labels)
            prefix = vector.new_zeros(rows, 0, vector.shape[1])
            valid = torch.zeros(rows, 0, dtype=torch.bool, device=vector.device)
        else:
            assert captions is not None and caption_mask is not None
            captions, valid = left_pad(captions, caption_mask)
            prefix = self.caption_proj(captions)
            shares = valid[:, :, None].to(prefix) / valid.sum(dim=1).clamp_min(1)[:, None, None]
            vector = (prefix * shares).sum(dim=1)
        if drop is not None:
            null = self.null.to(vector.dtype)
            vector = torch.where(drop[:, None], null, vector)
            prefix = torch.where(drop[:, None, None], null, prefix)
            valid = valid & ~drop[:, None]
        regions = self.plan_embeddings(prefix)[:, self.cell_order()] if self.config.plan_size else None
        return Condition(vector, prefix, valid, regions)

    def velocity(self, tokens: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Velocities (B, L, D) of all cells in one masked pass.

        Args:
            tokens: (B, L, D), cell by cell, each with its noise.
            times: (B, N) in [0, 1] of each cell; 0 is clean, 1 is noise.
            condition: of the rows.
        """
        before, cells = condition.prefix.shape[1], torch.arange(self.num_cells, device=tokens.device)
        cells = cells.repeat_interleave(self.cell_tokens)
        length = before + len(cells)
        mask = torch.zeros(len(tokens), 1, length, length, dtype=torch.bool, device=tokens.device)
        mask[..., :before] = condition.valid[:, None, None]
        mask[..., before:, before:] = cells[:, None] >= cells
        mask.diagonal(dim1=2, dim2=3).fill_(True)
        modulation = torch.cat((self._modulation(condition, 0), self._modulation(condition, times)), dim=1)
        inputs = self.inputs[0](tokens)
        hidden = self._run(
            torch.cat((condition.prefix, self._placed(inputs, 0, condition, slice(None))), dim=1),
            modulation, slice(0, length), before, mask, None, condition,
        )  # fmt: skip
        return self.output(hidden[:, before:])

    def prefill(self, condition: Condition) -> KVCache:
        """A cache that holds the prefix."""
        before = condition.prefix.shape[1]
        like = self.output.weight
        cache = KVCache(
            num_layers=len(self.blocks), rows=len(condition.vector), num_kv_heads=self.config.num_heads,
            max_length=before + self.num_tokens, head_dim=self.config.dim // self.config.num_heads,
            dtype=like.dtype, device=like.device,
        )  # fmt: skip
        cache.mask_prefix(condition.valid)
        if before:
            itself = torch.eye(before, dtype=torch.bool, device=like.device)
            mask = condition.valid[:, None, None] | itself
            modulation = self._modulation(condition, 0)
            self._run(condition.prefix, modulation, slice(0, before), before, mask, cache, condition)
            cache.advance(before)
        return cache

    def cell_velocity(
        self, tokens: torch.Tensor, time: float, cell: int, condition: Condition, cache: KVCache
    ) -> torch.Tensor:
        """Velocity (B, k*k, D) of one cell behind those that the cache holds, which stays as it is."""
        before, places = condition.prefix.shape[1], self._places(cell)
        times = torch.full((len(tokens), 1), float(time), device=tokens.device)
        inputs = self._placed(self.inputs[0](tokens), 0, condition, places)
        assert cache.bias is not None, "prefill masks the prefix"
        mask = cache.bias[..., : cache.length + tokens.shape[1]]
        span = slice(before + places.start, before + places.stop)
        return self.output(self._run(inputs, self._modulation(condition, times), span, before, mask, cache, condition))

    def keep_cell(self, tokens: torch.Tensor, cell: int, condition: Condition, cache: KVCache) -> None:
        """Stores the keys and values of a finished cell (B, k*k, D)."""
        self.cell_velocity(tokens, 0.0, cell, condition, cache)
        cache.advance(tokens.shape[1])

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        drop: torch.Tensor | None = None,
        noisy_context: bool = True,
        **condition: torch.Tensor,
    ) -> torch.Tensor:
        """The training loss (scalar): mean squared error of the velocity, over all cells.

        Args:
            tokens: (B, L, D), cell by cell.
            drop: rows (B,) without condition; in training mode sampled with probability `class_dropout` if None.
            noisy_context: whether earlier cells are noisy; without, one random cell of each image has noise and enters
                the loss, and the others are clean.
            condition: as of `embed_condition`.
        """
        rows, cells = len(tokens), self.num_cells
        if drop is None and self.training and self.config.class_dropout > 0:
            drop = torch.rand(rows, device=tokens.device) < self.config.class_dropout
        times = torch.randn(rows, cells, device=tokens.device).sigmoid()
        if not noisy_context:
            chosen = F.one_hot(torch.randint(cells, (rows,), device=tokens.device), cells)
            times = times * chosen
        noise = torch.randn_like(tokens)
        shares = times.repeat_interleave(self.cell_tokens, dim=1)[:, :, None]
        noisy = torch.lerp(tokens, noise, shares)
        found = self.velocity(noisy, times, self.embed_condition(**condition, drop=drop)).float()
        error = (found - (noise - tokens)).square()
        return error.mean() if noisy_context else error[shares[:, :, 0] > 0].mean()

    def _places(self, cell):
        return slice(cell * self.cell_tokens, (cell + 1) * self.cell_tokens)

    def _placed(self, inputs, half, condition, places):
        """Inputs (B, n, dim) of image tokens with what belongs to their places."""
        inputs = inputs + self.places[half][:, places]
        return inputs if condition.regions is None else inputs + condition.regions[:, places]

    def _modulation(self, condition, times):
        """Conditions (B, n, dim) of the prefix (times 0) or of the tokens of cells with times (B, cells)."""
        if isinstance(times, int):
            times = torch.zeros(len(condition.vector), condition.prefix.shape[1], device=condition.vector.device)
            embedded = self.time_embed(times.flatten()).unflatten(0, times.shape)
            return embedded + condition.vector[:, None]
        whole = (times * TIMES).floor().clamp(max=TIMES - 1)
        embedded = self.time_embed(whole.flatten()).unflatten(0, times.shape) + condition.vector[:, None]
        return embedded.repeat_interleave(self.cell_tokens, dim=1)

    def _run(self, x, modulation, span, before, mask, cache, condition):
        """States (B, n, dim) behind the last norm, of the positions `span` of prefix and cells."""
        rope = self._rope(before, x.device)[span]
        half = len(self.blocks) // 2
        x = _norm(x)
        for layer, block in enumerate(self.blocks):
            if layer == half:
                x = self.inputs[1](_norm(x))
                inside = max(0, before - span.start)  # how many of them are of the prefix
                places = slice(span.start + inside - before, span.stop - before)
                if places.stop > 0:
                    x = torch.cat((x[:, :inside], self._placed(x[:, inside:], 1, condition, places)), dim=1)
            x = block(x, modulation, rope, mask, cache, layer)
        return _norm(x)

    def _rope(self, before, device):
        """The rotary table of the prefix and all cells, in their order, made once for a prefix length and device."""
        key = before, device
        if self._table is None or self._table[0] != key:
            head_dim = self.config.dim // self.config.num_heads
            with torch.inference_mode(False), torch.no_grad():  # so that training can use the table of a sampling call
                table = rope_table(self.config.grid_size, head_dim, before, _ROPE_BASE, "identity").to(device)
                self._table = key, torch.cat((table[:before], table[before:][self.cell_order()]))
        return self._table[1]


def _norm(x):
    return F.rms_norm(x, x.shape[-1:], None, _EPS)
