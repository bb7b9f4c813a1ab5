"""TokenBridge: a masked autoencoder over quantised latents, with a head that samples a token dimension by dimension.

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv:2503.16430), section 3.3: the
transformer of `masked_autoencoder` reads the values that tokens stand for, and `dimension_head` samples new ones.
Parameters carry the authors' names, those of the head behind `head.`.

Scope: the network and its training loss. In which order tokens are sampled is the business of `studio.decoding`. It
holds
no levels: the values that tokens stand for come with each call.
"""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from studio.errors import StudioError
from studio.models.dimension_head import DimensionHead
from studio.models.masked_autoencoder import MaskedAutoencoder, both_halves, learned, take_rows

PRESETS: dict[str, dict[str, int]] = {
    "B": {**both_halves(768, 12, 12), "head_width": 768, "head_depth": 4},
    "L": {**both_halves(1024, 16, 16), "head_width": 1024, "head_depth": 4},
    "H": {**both_halves(1280, 20, 16), "head_width": 1024, "head_depth": 6},
}


class TokenBridge(MaskedAutoencoder, ModelMixin):
    """The network. (Pipelines of diffusers look for the name `ModelMixin` in the module of a component.)

    Args:
        grid_size: cells a side; an image has L = grid_size**2 of them.
        token_dim: tokens of a cell D, the tokenizer's dimensions.
        levels: of each dimension V.
        dimension_order: the dimension that is sampled at each place, a permutation; as the tokenizer's when None.
        encoder_dim, encoder_depth, encoder_heads, decoder_dim, decoder_depth, decoder_heads, mlp_ratio: sizes.
        head_width, head_depth, head_heads: of the transformer over dimensions.
        num_classes: classes without the null class; None for a model that reads words.
        caption_dim: width of the text states that such a model reads; None for one of classes.
        caption_length: text tokens of a caption, of which the buffer holds the last.
        buffer_size: places before the cells that hold the class or the caption.
        sampling_first_input_adds_step_embedding: whether the head's first input gets a vector in sampling that it never
            had in training, as in the authors' published runs.
        plan_size: side of a grid of regions, which divides `grid_size`; the last `plan_size**2` text states say what
            belongs into each, in raster order (`studio.models.plan`). 0: none, as in released weights.
        class_dropout: share of conditions replaced by the null vector in training.
        dropout: in attention and feed-forward, in training.

    Errors: `StudioError` for sizes that do not fit together.
    """

    _no_split_modules = ["Block"]

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
    ):
        super().__init__()
        order = list(range(token_dim)) if dimension_order is None else list(dimension_order)
        if sorted(order) != list(range(token_dim)):
            raise StudioError(f"dimension_order must hold each of 0 to {token_dim - 1} once, not {order}.")
        self.register_to_config(dimension_order=order)
        self.output_pos_embed = learned(1, grid_size**2, decoder_dim)
        self.head = DimensionHead(
            token_dim, levels, decoder_dim, head_width, head_depth, head_heads, mlp_ratio, dropout
        )
        self.apply(self._init_weights)
        self.forget_plan()
        self.head.close_gates()

    @classmethod
    def preset(cls, name: str, **overrides) -> "TokenBridge":
        """A published size, "B", "L" or "H", for 256 pixels: 16x16 cells of 16 tokens, ImageNet classes."""
        if name not in PRESETS:
            raise StudioError(f"There is no TokenBridge size {name!r}; the sizes are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_places(self) -> nn.Parameter:
        """Vectors (1, L, decoder_dim) of the positions, which the head's conditions get at the end."""
        return self.output_pos_embed

    @property
    def order(self) -> torch.Tensor:
        """The dimension at each place of the order of sampling, (D,) int64."""
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
        """The training loss, a number: cross-entropy over the dimensions of the first `masked` cells of each order.

        Args:
            tokens: levels (B, L, D), int64, in the tokenizer's order of dimensions.
            values: what they stand for (B, L, D).
            order: of the cells, (B, L).
            asked: how many of the masked cells count, the first of each order; all when None. The head works on every
                dimension of a cell, so that few cells are much faster.
            drop: (B,) rows with the null vector; in training mode sampled with probability `class_dropout` if None.
            condition: as of `embed_condition`.
        """
        drop = self.dropped_rows(len(tokens)) if drop is None else drop
        buffer, _ = self.embed_condition(**condition, drop=drop)
        hidden, visible = order[:, :masked], order[:, masked:]
        states = self.decode(self.encode(values, visible, buffer), visible, hidden[:, :asked]).flatten(0, 1)
        targets = take_rows(tokens, hidden[:, :asked]).flatten(0, 1)[:, self.order]
        return F.cross_entropy(self.head(states, targets).flatten(0, 1), targets.flatten())
