"""TokenBridge (arXiv:2503.16430) over the quantised latents of a KL tokenizer.

What is predicted from and in which order cells are hidden is as in `mar`. Latents are sampled from their Gaussians and
then quantised; the order of dimensions is measured on the training images.

Deviations from the authors' recipe: sampling gives the head's first input what training gave it, and the head learns
from some masked cells of each image, which are chosen at random, as the order is.
"""

from pathlib import Path
from typing import Any

import torch

from studio.checkpoints.loading import class_of, load_model
from studio.errors import StudioError
from studio.models.mar import MAR
from studio.models.token_bridge import TokenBridge
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.tokenizers.token_bridge import TokenBridgeTokenizer, low_frequency_order
from studio.training.generator import Conditioned
from studio.training.mar import MARRecipe
from studio.training.recipe import Defaults
from studio.training.text import Text

ASKED = 16
"""Masked cells of an image that the head learns from at each step."""
_ATTENTION_HEADS = ("encoder_heads", "decoder_heads")
"""Counts that shapes of weights do not show."""
_OF_THE_HEAD = ("head_width", "head_depth", "head_heads", "head_frequencies")
MEASURED = 2000
"""Images whose latents say in which order dimensions are sampled."""


class TrainableBridge(Conditioned):
    """A TokenBridge, and the quantiser of its tokens."""

    def __init__(self, transformer: TokenBridge, text: Text | None, image_tokenizer: TokenBridgeTokenizer):
        super().__init__(transformer, text)
        self.quantizer = image_tokenizer.quantizer
        self.scale = image_tokenizer.continuous.config.scaling_factor

    def forward(
        self, latents: torch.Tensor, order: torch.Tensor, masked: torch.Tensor, **given: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy of latents (B, C, h, w) over some of the first `masked` cells (1,) of orders (B, L)."""
        tokens = self.quantizer.encode((latents * self.scale).flatten(2).transpose(1, 2))
        values = self.quantizer.decode(tokens)
        return self.transformer(tokens, values, order, int(masked), asked=ASKED, **self.condition(**given))


def shared_with_mar(transformer: TokenBridge, mar: MAR) -> dict[str, torch.Tensor]:
    """The weights of a TokenBridge with all of a MAR's but its head."""
    found = {key: part for key, part in mar.state_dict().items() if not key.startswith("diffloss.")}
    found["output_pos_embed"] = found.pop("diffusion_pos_embed_learned")
    return {**transformer.head.state_dict(prefix="head."), **found}


class TokenBridgeRecipe(MARRecipe):
    """A TokenBridge, from scratch or with all of a MAR but its head."""

    kind = "token-bridge"
    purpose = "Samples a few cells of an image at a time and each dimension by dimension, under a caption or a class."
    defaults = Defaults(steps=4000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline = TokenBridgePipeline
    model = {
        "encoder_layers": 1, "heads": None, "head_width": 128, "head_depth": 1, "head_heads": 4, "buffer_size": None,
        "levels": 32, "head_frequencies": 0,
    }  # fmt: skip
    sampling = {"default_guidance_scale": 1.0, "default_temperature": 0.7, "default_num_inference_steps": 16}

    def trainable(self, transformer: Any) -> Conditioned:
        return TrainableBridge(transformer, self.text, self.bridge)

    def network(self, sizes: dict) -> Any:
        some = self.latents[:: max(1, len(self.latents) // MEASURED), 0].float()
        self.bridge = TokenBridgeTokenizer.from_autoencoder(
            self.image_tokenizer, levels=self.model["levels"], dimension_order=low_frequency_order(some)
        )
        return TokenBridge(
            levels=self.model["levels"],
            dimension_order=self.bridge.config.dimension_order,
            sampling_first_input_adds_step_embedding=False,
            **{name: self.model[name] for name in _OF_THE_HEAD},
            **sizes,
        )

    def load_transformer(self, transformer: Any, folder: Path) -> None:
        """From a TokenBridge, or from a MAR of the same sizes: it reads and predicts the same cells."""
        folder, ours = folder / "transformer", transformer.config
        is_mar = class_of(folder) == MAR.__name__
        weights = load_model(MAR if is_mar else TokenBridge, folder, torch.float32)
        for name in _ATTENTION_HEADS if is_mar else ("levels", "dimension_order", *_ATTENTION_HEADS):
            if weights.config[name] != ours[name]:
                raise StudioError(f"{folder.parent} was trained with {name} {weights.config[name]}, not {ours[name]}.")
        transformer.load_state_dict(shared_with_mar(transformer, weights) if is_mar else weights.state_dict())

    def pipeline_of(self, module: Any, image_tokenizer: torch.nn.Module | None = None) -> Any:
        return super().pipeline_of(module, image_tokenizer or self.bridge)

    def save_pipeline(self, folder: Path, module: Any, image_tokenizer: torch.nn.Module | None = None) -> None:
        super().save_pipeline(folder, module, image_tokenizer or self.bridge)
