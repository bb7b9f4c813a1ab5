"""One-D-Piece tokenizer: an image as a row of tokens, of which any first few decode to an image.

"One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression" (arXiv:2501.10064), which is TiTok
(arXiv:2406.07550) with Tail Token Drop: in training the decoder gets a random number of first tokens, so the most
important content comes first. Parameters carry the authors' names.

Deviations from the authors' code: images are in [-1, 1] here, as everywhere in Studio; the caller chooses the length,
the module in training mode does not sample it; a batch may hold images of different lengths. The pixel stage may
also be one linear layer a patch, for small models that are trained end to end.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.checks import shown
from studio.errors import StudioError
from studio.tokenizers.latent_transformer import LatentDecoder, LatentEncoder
from studio.tokenizers.maskgit_decoder import MaskGITDecoder
from studio.tokenizers.patch_pixels import PatchPixels
from studio.tokenizers.vq import Codebook

PRESETS = {
    "S": {"width": 512, "layers": 8, "heads": 8},
    "B": {"width": 768, "layers": 12, "heads": 12},
    "L": {"width": 1024, "layers": 24, "heads": 16},
}
"""The published sizes of encoder and decoder."""

PIXEL_STAGES = ("maskgit-vqgan", "patches")


class QuantizedRow(NamedTuple):
    """Output of the quantiser in training; both losses are means over all tokens, on unit vectors.

    Attributes:
        vectors: unit code vectors (B, N, code_dim) with straight-through gradients.
        tokens: code indices (B, N), int64.
        commitment: mean((z - stop_gradient(code))^2), not weighted.
        codebook: mean((code - stop_gradient(z))^2).
    """

    vectors: torch.Tensor
    tokens: torch.Tensor
    commitment: torch.Tensor
    codebook: torch.Tensor


class OneDPieceTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Encodes images to rows of code indices, and decodes the first n of them for any n.

    Args:
        in_channels: colour channels.
        sample_size: side in pixels of the images.
        patch_size: side in pixels of a patch.
        num_tokens: tokens N of an image, the maximum of `decode`.
        encoder_width, encoder_layers, encoder_heads: size of the encoder; see `PRESETS`.
        decoder_width, decoder_layers, decoder_heads: size of the decoder.
        code_dim: length of a code vector.
        codebook_size: number of codes V.
        legacy_reshape: whether outputs (N, width) of the encoder are reshaped to (width, N), not transposed, as the
            published weights were trained; a token then mixes numbers of all queries.
        pixel_stage: `"maskgit-vqgan"`, where the decoder predicts weights over a second codebook for each patch and a
            convolutional decoder reads the weighted sum, or `"patches"`, where the decoder's last layer gives the
            pixels and two convolutions smooth the borders.
        pixel_base_channels: width of the finest level of the convolutional decoder, or between the two convolutions.
        pixel_codes, pixel_code_dim: size of the second codebook.
        pixel_channel_multipliers, pixel_res_blocks: of the convolutional decoder; each level after the first halves
            the grid.
        norm_groups: groups of every GroupNorm.

    Raises:
        StudioError: sizes that do not fit together.

    Example:
        >>> tokenizer = OneDPieceTokenizer(**sizes("S"))
    """

    config: Any

    _no_split_modules = ["Block", "MaskGITResBlock"]  # type: ignore[assignment]  # None in diffusers

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int = 256,
        patch_size: int = 16,
        num_tokens: int = 256,
        encoder_width: int = 512,
        encoder_layers: int = 8,
        encoder_heads: int = 8,
        decoder_width: int = 512,
        decoder_layers: int = 8,
        decoder_heads: int = 8,
        code_dim: int = 12,
        codebook_size: int = 4096,
        legacy_reshape: bool = True,
        pixel_stage: str = "maskgit-vqgan",
        pixel_codes: int = 1024,
        pixel_code_dim: int = 256,
        pixel_base_channels: int = 128,
        pixel_channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        pixel_res_blocks: int = 2,
        norm_groups: int = 32,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise StudioError(f"Images of {sample_size} pixels a side do not split into patches of {patch_size}.")
        if pixel_stage not in PIXEL_STAGES:
            raise StudioError(f"pixel_stage is one of {', '.join(PIXEL_STAGES)}, not {shown(pixel_stage)}.")
        grid = {"side": sample_size // patch_size, "latents": num_tokens}
        encoder = {"width": encoder_width, "layers": encoder_layers, "heads": encoder_heads}
        decoder = {"width": decoder_width, "layers": decoder_layers, "heads": decoder_heads}
        mixed = pixel_stage == "maskgit-vqgan"
        features = pixel_codes if mixed else in_channels * patch_size**2
        self.encoder = LatentEncoder(in_channels, patch_size, code_dim, **encoder, **grid)
        self.decoder = LatentDecoder(code_dim, features, 2 * decoder_width, **decoder, **grid)
        self.latent_tokens = nn.Parameter(torch.randn(num_tokens, encoder_width) * encoder_width**-0.5)
        self.quantize = Codebook(codebook_size, code_dim)
        if not mixed:
            self.pixel_decoder: nn.Module = PatchPixels(in_channels, patch_size, pixel_base_channels)
            return
        if 2 ** (len(pixel_channel_multipliers) - 1) != patch_size:
            raise StudioError(f"{len(pixel_channel_multipliers)} levels make no patches of {patch_size} pixels.")
        self.pixel_quantize = nn.ModuleDict({"embedding": nn.Embedding(pixel_codes, pixel_code_dim)})
        self.pixel_decoder = MaskGITDecoder(
            pixel_code_dim, in_channels, pixel_base_channels, tuple(pixel_channel_multipliers), pixel_res_blocks,
            norm_groups,
        )  # fmt: skip

    @property
    def codebook(self) -> torch.Tensor:
        """Unit code vectors (V, code_dim)."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    @property
    def row_length(self) -> int:
        """Tokens N of an image in a row."""
        return self.config.num_tokens

    @property
    def bits_per_token(self) -> float:
        """Bits of a code index, log2 V."""
        return math.log2(self.config.codebook_size)

    @property
    def lengths(self) -> list[int]:
        """Lengths at which it is evaluated: the full one, halved up to four times, the shortest first."""
        return sorted({self.config.num_tokens // 2**halvings for halvings in range(5)} - {0})

    def encode_features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, channels, side, side) in [-1, 1] to vectors before quantisation (B, N, code_dim).

        Raises:
            StudioError: images of another shape.
        """
        side, channels = self.config.sample_size, self.config.in_channels
        if images.ndim != 4 or images.shape[1:] != (channels, side, side):
            raise StudioError(f"Images must be (B, {channels}, {side}, {side}); got {tuple(images.shape)}.")
        rows = self.encoder((images + 1) / 2, self.latent_tokens)
        if self.config.legacy_reshape:
            columns = rows.reshape(len(rows), rows.shape[2], rows.shape[1], 1)
        else:
            columns = rows.transpose(1, 2)[..., None]
        return self.encoder.conv_out(columns)[..., 0].transpose(1, 2)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, channels, side, side) in [-1, 1] to code indices (B, N), int64, most important first."""
        return self.quantize.nearest(self.encode_features(images).transpose(1, 2))

    def quantize_features(self, features: torch.Tensor) -> QuantizedRow:
        """For training: quantises vectors (B, N, code_dim) to the nearest unit code vectors, and computes the losses.

        Both are normalised first; the codebook learns by gradient descent.
        """
        unit = F.normalize(features.float(), dim=-1)
        tokens = self.quantize.nearest(features.transpose(1, 2))
        codes = F.normalize(F.embedding(tokens, self.quantize.embedding.weight.float()), dim=-1)
        commitment, codebook = F.mse_loss(unit, codes.detach()), F.mse_loss(codes, unit.detach())
        return QuantizedRow(unit + (codes - unit).detach(), tokens, commitment, codebook)

    def decode_features(self, vectors: torch.Tensor, length: int | Sequence[int] | None = None) -> torch.Tensor:
        """Unit code vectors (B, n, code_dim) to the features of each patch (B, features, h, w).

        Features are logits over the second codebook, or pixels. `length` is as of `decode`.
        """
        vectors, lengths = self.tail_token_drop(vectors, length)
        return self.decoder(vectors.to(self.dtype), lengths)

    def decode_vectors(self, vectors: torch.Tensor, length: int | Sequence[int] | None = None) -> torch.Tensor:
        """Unit code vectors (B, n, code_dim) to images (B, channels, side, side), about [-1, 1]."""
        features = self.decode_features(vectors, length)
        if self.config.pixel_stage == "patches":
            return self.pixel_decoder(features) * 2 - 1
        codes = self.pixel_quantize["embedding"]
        assert isinstance(codes, nn.Embedding)
        mixture = features.movedim(1, -1).softmax(dim=-1) @ codes.weight
        return self.pixel_decoder(mixture.movedim(-1, 1)) * 2 - 1

    def decode(self, tokens: torch.Tensor, length: int | Sequence[int] | None = None) -> torch.Tensor:
        """Code indices (B, n) to images (B, channels, side, side), about [-1, 1].

        Args:
            tokens: the first n tokens of each image, n from 1 to N.
            length: how many of them are used, one number for all or one for each image; all when None.

        Raises:
            StudioError: no tokens, more than N, or another number of lengths than images.
        """
        return self.decode_vectors(self.quantize.lookup(tokens).transpose(1, 2), length)

    def forward(
        self, images: torch.Tensor, length: int | Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For training: reconstruction from the first tokens, and the quantiser's loss over all tokens.

        Args:
            images: (B, channels, side, side) in [-1, 1].
            length: as of `decode`.

        Returns:
            Images, and the loss: a quarter of the commitment loss plus the codebook loss.
        """
        quantized = self.quantize_features(self.encode_features(images))
        return self.decode_vectors(quantized.vectors, length), 0.25 * quantized.commitment + quantized.codebook

    def tail_token_drop(
        self, vectors: torch.Tensor, length: int | Sequence[int] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tail Token Drop (arXiv:2501.10064, section 3.2): only the first tokens of an image are decoded.

        Args:
            vectors: (B, n, code_dim).
            length: how many of them count, as of `decode`.

        Returns:
            The vectors that count for any image, and how many for each; None where all of those count.

        Raises:
            StudioError: for lengths that cannot be.
        """
        n, most = vectors.shape[1], self.config.num_tokens
        if not 1 <= n <= most:
            raise StudioError(f"This tokenizer decodes from 1 to {most} tokens, not from {n}.")
        if length is None:
            return vectors, None
        lengths = torch.as_tensor(length)
        if lengths.ndim and lengths.shape != vectors.shape[:1]:
            raise StudioError(f"Give one length, or one for each of {len(vectors)} images, not {lengths.numel()}.")
        shortest, longest = int(lengths.min()), int(lengths.max())
        if not 1 <= shortest <= longest <= n:
            raise StudioError(f"length must be from 1 to {n}, the number of tokens given, not {shown(length)}.")
        return vectors[:, :longest], None if shortest == longest else lengths


def sizes(preset: str) -> dict[str, int]:
    """The arguments of a `OneDPieceTokenizer` of a published size, the same for encoder and decoder.

    Raises:
        StudioError: an unknown preset.
    """
    if preset not in PRESETS:
        raise StudioError(f"There is no size {shown(preset)}: choose one of {', '.join(PRESETS)}.")
    return {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in PRESETS[preset].items()}
