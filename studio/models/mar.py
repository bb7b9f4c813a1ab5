"""MAR: a masked autoencoder over continuous image tokens, whose states condition a diffusion-loss head.

"Autoregressive Image Generation without Vector Quantization" (arXiv:2406.11838): the transformer of
`masked_autoencoder` gives each position the vector from which `diffusion_head` samples its token. Parameters carry the
authors' names.

Scope: the network and its training loss. `studio.decoding.mar` samples tokens.
"""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.checks import shown
from studio.errors import StudioError
from studio.models.diffusion_head import DiffusionLoss
from studio.models.masked_autoencoder import MaskedAutoencoder, both_halves, learned, take_rows

PRESETS: dict[str, dict[str, int]] = {
    "B": {**both_halves(768, 12, 12), "head_width": 1024, "head_depth": 6},
    "L": {**both_halves(1024, 16, 16), "head_width": 1280, "head_depth": 8},
    "H": {**both_halves(1280, 20, 16), "head_width": 1536, "head_depth": 12},
}


def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Latents (B, C, H, W) to tokens (B, H/p * W/p, C*p*p); a token holds whole channels one after the other."""
    blocks = latents.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Tokens (B, n*n, C*p*p) of a square grid to latents (B, C, n*p, n*p): the inverse of `patchify`."""
    side = round(tokens.shape[1] ** 0.5)
    blocks = tokens.unflatten(2, (-1, patch_size, patch_size)).unflatten(1, (side, side))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class MAR(MaskedAutoencoder, ModelMixin):  # type: ignore[misc]  # both bases define config_name
    """The network. (diffusers looks for the name `ModelMixin` in the module of a pipeline's component.)

    Args:
        grid_size: tokens a side; an image has L = grid_size**2.
        token_dim: numbers of a token D: latent channels times patch_size**2.
        patch_size: side of the blocks of latents that make a token.
        encoder_dim, encoder_depth, encoder_heads, decoder_dim, decoder_depth, decoder_heads, mlp_ratio: sizes.
        num_classes: classes without the null class; None for a text-conditional model.
        caption_dim: width of the text states; None for a class-conditional model.
        caption_length: text tokens of a caption; the buffer holds the last `buffer_size` of them.
        buffer_size: positions before the image tokens that hold the class or the caption.
        head_width, head_depth: of the diffusion-loss head.
        latent_scale: factor by which latents are multiplied before they become tokens.
        token_limit: largest absolute value of a token, to which denoising clamps its prediction
            (`GaussianDiffusion`); None: no limit, as in the authors' code.
        plan_size: regions a side for region conditioning (`studio.models.region_conditioning`), a divisor of
            `grid_size`; the last `plan_size**2` text states are those of the regions in raster order. 0: none, as in
            released weights.
        class_dropout: probability that the null vector replaces a condition in training.
        dropout: in attention and feed-forward, in training.

    Raises:
        StudioError: sizes that do not fit together.
    """

    _no_split_modules = ["Block", "ResidualBlock"]  # type: ignore[assignment]  # None in diffusers

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
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        caption_length: int = 32,
        buffer_size: int = 64,
        head_width: int = 1024,
        head_depth: int = 6,
        latent_scale: float = 0.2325,
        token_limit: float | None = None,
        class_dropout: float = 0.1,
        dropout: float = 0.1,
        plan_size: int = 0,
    ):
        super().__init__()
        if token_dim % patch_size**2:
            raise StudioError(f"token_dim {token_dim} must be a multiple of patch_size**2, {patch_size**2}.")
        self.diffusion_pos_embed_learned = learned(1, grid_size**2, decoder_dim)
        self.apply(self._init_weights)
        self.zero_region_conditioning()
        self.diffloss = DiffusionLoss(token_dim, decoder_dim, head_width, head_depth, token_limit)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MAR":
        """A model of a published size, "B", "L" or "H": 256 pixels, 16x16 tokens of 16 numbers, ImageNet classes.

        Raises:
            StudioError: an unknown name.
        """
        if name not in PRESETS:
            raise StudioError(f"There is no MAR size {shown(name)}; the sizes are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def head_positions(self) -> nn.Parameter:
        """Position embeddings (1, L, decoder_dim), added to the head's conditions."""
        return self.diffusion_pos_embed_learned

    def patchify(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W) of a variational autoencoder to tokens (B, L, D)."""
        return patchify(latents * self.config.latent_scale, self.config.patch_size)

    def unpatchify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) to latents (B, C, H, W) for the decoder of a variational autoencoder."""
        return unpatchify(tokens, self.config.patch_size) / self.config.latent_scale

    def forward(
        self,
        tokens: torch.Tensor,
        order: torch.Tensor,
        masked: int,
        *,
        drop: torch.Tensor | None = None,
        repeats: int = 4,
        **condition: torch.Tensor,
    ) -> torch.Tensor:
        """The training loss (scalar): the diffusion loss of the masked tokens.

        Args:
            tokens: (B, L, D).
            order: a permutation of the positions for each image, (B, L), int64.
            masked: how many positions are masked, the first of each order.
            drop: rows (B,) that get the null vector; in training mode sampled with probability `class_dropout` if None.
            repeats: times and noises sampled for each token.
            condition: as of `embed_condition`.
        """
        drop = self.dropped_rows(len(tokens)) if drop is None else drop
        buffer, _ = self.embed_condition(**condition, drop=drop)
        hidden, visible = order[:, :masked], order[:, masked:]
        conditions = self.decode(self.encode(tokens, visible, buffer), visible, hidden).flatten(0, 1)
        targets = take_rows(tokens, hidden).flatten(0, 1)
        return self.diffloss(targets.repeat(repeats, 1), conditions.repeat(repeats, 1)).mean()
