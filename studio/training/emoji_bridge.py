"""Recipe of `emoji-bridge`: TokenBridge (arXiv:2503.16430) over the latents of `emoji-kl`, for captions.

What is drawn from and in which order cells are hidden is as in `emoji_mar`. Latents are drawn from their Gaussians and
then quantised; the order of dimensions is measured on the training pictures.

Deviations from the authors' recipe: drawing gives the head's first input what training gave it, and the head learns
from some masked cells of each picture, which are chosen at random, as the order is.
"""

import torch

from studio.errors import StudioError
from studio.models.token_bridge import TokenBridge
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.tokenizers.token_bridge import TokenBridgeTokenizer, low_frequency_order
from studio.training.emoji_mar import SIZES as MAR_SIZES
from studio.training.emoji_mar import EmojiMAR
from studio.training.from_words import Listening
from studio.training.recipe import Defaults

SIZES = {**MAR_SIZES, "head_width": 128, "head_depth": 1, "head_heads": 4}
LEVELS = 32
ASKED = 16
"""Masked cells of a picture that the head learns from at each step."""
MEASURED = 2000
"""Pictures whose latents say in which order dimensions are drawn."""
DRAWING = {"default_guidance_scale": 1.0, "default_temperature": 0.7, "default_num_steps": 16}
"""Of some guidances and temperatures, these came nearest to the pictures of 64 training captions."""


class TrainableBridge(Listening):
    """A TokenBridge, the text encoder, and the quantiser of its tokens."""

    def __init__(self, transformer: TokenBridge, text_encoder, image_tokenizer: TokenBridgeTokenizer):
        super().__init__(transformer, text_encoder)
        self.quantizer = image_tokenizer.quantizer
        self.scale = image_tokenizer.continuous.config.scaling_factor

    def forward(self, latents, order, masked, input_ids, attention_mask):
        """Mean cross-entropy of latents (B, C, h, w) over some of the first `masked` cells (1,) of orders (B, L)."""
        tokens = self.quantizer.encode((latents * self.scale).flatten(2).transpose(1, 2))
        values = self.quantizer.decode(tokens)
        condition = self.condition(input_ids, attention_mask)
        return self.transformer(tokens, values, order, int(masked), asked=ASKED, **condition)


class EmojiBridge(EmojiMAR):
    """Draws an emoji from words, a few cells at a time and each dimension by dimension: latents of `emoji-kl`."""

    name = "emoji-bridge"
    data = "Fluent Emoji on ten backgrounds, without the held-out combinations; random captions, latents of emoji-kl"
    defaults = Defaults(steps=3000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline, drawing = TokenBridgePipeline, DRAWING
    sizes = SIZES

    def trainable(self, transformer):
        return TrainableBridge(transformer, self.text.text_encoder, self.bridge)

    def network(self, image_tokenizer, shape):
        some = self.laws[:: max(1, len(self.laws) // MEASURED), 0].float()
        self.bridge = TokenBridgeTokenizer.from_autoencoder(
            image_tokenizer, levels=LEVELS, dimension_order=low_frequency_order(some)
        )
        return TokenBridge(
            levels=LEVELS,
            dimension_order=self.bridge.config.dimension_order,
            sampling_first_input_adds_step_embedding=False,
            **shape,
        )

    def load(self, module, folder):
        weights = TokenBridge.from_pretrained(folder / "transformer", dtype=torch.float32)
        ours = module.transformer.config
        for name in ("levels", "dimension_order"):
            if weights.config[name] != ours[name]:
                raise StudioError(f"{folder} was trained with {name} {weights.config[name]}, not {ours[name]}.")
        module.transformer.load_state_dict(weights.state_dict())

    def export(self, module, folder):
        self.save_pipeline(folder, self.bridge, module)
