"""ResGen: a transformer that sees the first levels of each cell's residual codes and predicts the sum of the others.

"Efficient Generative Modeling with Residual Vector Quantization-Based Tokens" (arXiv:2412.10208). Levels are masked
from the deepest up: the input of a cell is the sum of its visible code vectors and the number of hidden levels, the
prediction is the sum of the hidden code vectors. So the number of sampling steps does not depend on the depth.

No code is published. Ours, because the paper leaves it open or it could not be compared: the architecture (linear
input, learned positions, one embedding per number of hidden levels, adaptive layer norms from the condition as in DiT,
arXiv:2212.09748; captions also stand as positions in front, and may end with region vectors), and the low-rank means of
the mixture. `prediction="levels"` is an ablation under the same masking: an independent softmax over the codes of every
level.

Scope: the network and its training loss. `studio.decoding.resgen` masks and samples.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.checks import shown
from studio.errors import StudioError
from studio.models.gaussian_mixture import GaussianMixture, Mixture
from studio.models.llama_blocks import CaptionEmbedder, ClassEmbedder, left_pad
from studio.models.region_conditioning import RegionConditioning, check_region_conditioning

PREDICTIONS = ("mixture", "levels")
LOSSES = ("variational", "exact")


class LevelLogits(NamedTuple):
    """Prediction of the ablation: logits (..., D, V) of every level of a cell."""

    logits: torch.Tensor


class LevelSoftmax(nn.Module):
    """States (..., dim) to independent logits of every level."""

    def __init__(self, dim: int, depth: int, vocab_size: int):
        super().__init__()
        self.shape = (depth, vocab_size)
        self.linear = nn.Linear(dim, depth * vocab_size)

    def forward(self, states: torch.Tensor) -> LevelLogits:
        return LevelLogits(self.linear(states).float().unflatten(-1, self.shape))


class Block(nn.Module):
    """Bidirectional attention and feed-forward, modulated by the condition (AdaLN-Zero: gates start at zero)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x (B, n, dim) under a condition (B, dim); mask (B, 1, 1, n) is true where a position may be seen."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(context))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self._attend(_norm(x) * (1 + scale1) + shift1, mask)
        return x + gate2 * self.mlp(_norm(x) * (1 + scale2) + shift2)

    def _attend(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class ResGen(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """The network, conditioned on classes (`num_classes`) or on captions (`caption_dim`).

    Args:
        num_positions: cells L of the grid.
        depth, vocab_size, code_dim: levels D, codes V a level, and length C of a code vector.
        dim, num_layers, num_heads: sizes.
        num_classes: classes without the null class.
        caption_dim, caption_length: width of the text encoder and its number of positions.
        prediction: "mixture" or, as an ablation, "levels".
        components, rank, sigma, learn_sigma: of the mixture, see `GaussianMixture`.
        plan_size: regions a side for region conditioning (`studio.models.region_conditioning`), a divisor of the
            grid's side; the last `plan_size**2` caption vectors are those of the regions in raster order. 0: none.
        condition_dropout: probability that the null condition replaces a condition in training.

    Raises:
        StudioError: sizes that do not fit together, or conditions that do not fit the model.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        num_positions: int = 64,
        depth: int = 8,
        vocab_size: int = 1024,
        code_dim: int = 64,
        dim: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        num_classes: int | None = None,
        caption_dim: int | None = None,
        caption_length: int | None = None,
        prediction: str = "mixture",
        components: int = 1024,
        rank: int = 32,
        sigma: float = 1.0,
        learn_sigma: bool = False,
        condition_dropout: float = 0.1,
        plan_size: int = 0,
    ):
        super().__init__()
        if (num_classes is None) == (caption_dim is None):
            raise StudioError("Give ResGen exactly one of num_classes and caption_dim.")
        if caption_dim is not None and not caption_length:
            raise StudioError("A caption-conditional ResGen needs caption_length, its number of caption positions.")
        if dim % num_heads:
            raise StudioError(f"dim {dim} must split into {num_heads} heads.")
        if prediction not in PREDICTIONS:
            raise StudioError(f"prediction is one of {', '.join(PREDICTIONS)}, not {shown(prediction)}.")
        grid_size = round(num_positions**0.5)
        check_region_conditioning(plan_size, grid_size if grid_size**2 == num_positions else None, caption_length)
        self.condition: ClassEmbedder | CaptionEmbedder
        if num_classes is not None:
            self.condition = ClassEmbedder(num_classes, dim)
        else:
            assert caption_dim is not None and caption_length is not None
            self.condition = CaptionEmbedder(caption_dim, caption_length, dim)
        self.input = nn.Linear(code_dim, dim)
        self.positions = nn.Parameter(torch.empty(1, num_positions, dim))
        self.hidden_levels = nn.Embedding(depth + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(num_layers))
        self.modulation = nn.Linear(dim, 2 * dim)
        for weight in (self.positions, self.hidden_levels.weight, self.modulation.weight):
            nn.init.normal_(weight, std=0.02)
        if plan_size:
            self.plan_embeddings = RegionConditioning(plan_size, grid_size, dim)
            nn.init.zeros_(self.plan_embeddings.weight)
        self.head: GaussianMixture | LevelSoftmax
        if prediction == "mixture":
            self.head = GaussianMixture(dim, code_dim, components, rank, sigma, learn_sigma)
        else:
            self.head = LevelSoftmax(dim, depth, vocab_size)

    @property
    def num_tokens(self) -> int:
        """Cells of an image."""
        return self.config.num_positions

    def forward(
        self,
        visible: torch.Tensor,
        hidden: torch.Tensor,
        *,
        class_labels: torch.Tensor | None = None,
        captions: torch.Tensor | None = None,
        caption_mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> Mixture | LevelLogits:
        """Predicts the hidden levels of each cell.

        Args:
            visible: sums (B, L, C) of the visible code vectors.
            hidden: number of hidden levels (B, L), 0 to D.
            class_labels: (B,), for a class-conditional model.
            captions, caption_mask: (B, T, caption_dim), and (B, T), true at text, for a text-conditional model.
            drop: rows (B,) that get the null condition. In training mode without it, conditions are dropped with
                probability `condition_dropout`, sampled from the global generator.

        Returns:
            `Mixture` over sums of the hidden code vectors (B, L, ...), or `LevelLogits`; float32.
        """
        if drop is None and self.training and self.config.condition_dropout > 0:
            drop = torch.rand(len(visible), device=visible.device) < self.config.condition_dropout
        prefix, context, mask = self._embed_condition(class_labels, captions, caption_mask, drop)
        x = self.input(visible.to(prefix.dtype)) + self.positions + self.hidden_levels(hidden)
        if self.config.plan_size:
            x = x + self.plan_embeddings(prefix)
        x = torch.cat((prefix, x), dim=1)
        for block in self.blocks:
            x = block(x, context, mask)
        shift, scale = self.modulation(F.silu(context))[:, None].chunk(2, dim=-1)
        return self.head(_norm(x[:, prefix.shape[1] :]) * (1 + scale) + shift)

    def loss(
        self,
        vectors: torch.Tensor,
        codes: torch.Tensor,
        hidden: torch.Tensor,
        form: str = "variational",
        **condition: torch.Tensor,
    ) -> torch.Tensor:
        """The training loss (scalar): mean over the cells with hidden levels, or over hidden codes in the ablation.

        Args:
            vectors: code vectors (B, L, D, C) of all levels of an image.
            codes: their indices (B, L, D), which the ablation predicts.
            hidden: how many of the deepest levels (B, L) are hidden.
            form: "variational" or "exact" likelihood of the mixture.
            condition: as of `forward`.

        Raises:
            StudioError: another form.
        """
        if form not in LOSSES:
            raise StudioError(f"form is one of {', '.join(LOSSES)}, not {shown(form)}.")
        is_hidden = torch.arange(vectors.shape[2], device=hidden.device) >= vectors.shape[2] - hidden[..., None]
        visible, missing = (vectors * which[..., None] for which in (~is_hidden, is_hidden))
        prediction = self(visible.sum(dim=2), hidden, **condition)
        if isinstance(prediction, LevelLogits):
            costs = F.cross_entropy(prediction.logits.movedim(-1, 1), codes, reduction="none")
            return costs[is_hidden].mean()
        if form == "variational":
            assert isinstance(self.head, GaussianMixture)
            costs = self.head.variational_loss(prediction, missing.sum(dim=2))
        else:
            assert isinstance(self.head, GaussianMixture)
            costs = -self.head.log_likelihood(prediction, missing.sum(dim=2))
        return costs[hidden > 0].mean()

    def _embed_condition(
        self,
        class_labels: torch.Tensor | None,
        captions: torch.Tensor | None,
        caption_mask: torch.Tensor | None,
        drop: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Positions in front (B, T or 0, dim), the condition's vector (B, dim), and the attention mask or None."""
        if self.config.num_classes is not None:
            if class_labels is None or captions is not None:
                raise StudioError("This model is class-conditional: pass class_labels and no captions.")
            embedded = self.condition(class_labels, drop)
            return embedded[:, :0], embedded[:, 0], None
        if captions is None or class_labels is not None:
            raise StudioError("This model is text-conditional: pass captions and no class_labels.")
        if caption_mask is None:
            embedded = self.condition(captions, drop)
            return embedded, embedded.mean(dim=1), None
        captions, valid = left_pad(captions, caption_mask)
        embedded = self.condition(captions, drop)
        weights = valid.to(embedded.dtype) / valid.sum(dim=1, keepdim=True).clamp(min=1)
        cells = valid.new_ones(len(valid), self.config.num_positions)
        return embedded, (embedded * weights[..., None]).sum(dim=1), torch.cat((valid, cells), dim=1)[:, None, None]


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
