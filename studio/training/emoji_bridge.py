"""Recipe of `emoji-bridge`: TokenBridge (arXiv:2503.16430) over the latents of `emoji-kl`, for captions.

What is drawn from and in which order cells are hidden is as in `emoji_mar`. Latents are drawn from their Gaussians and
then quantised; the order of dimensions is measured on the training pictures.

Deviation from the authors' recipe: drawing gives the head's first input what training gave it.
"""

import copy
import shutil
from pathlib import Path

import torch
from torch import nn

from studio.checkpoints.vocabulary import CONCEPTS_FILE
from studio.errors import StudioError
from studio.models.token_bridge import TokenBridge
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.tokenizers.token_bridge import TokenBridgeTokenizer, low_frequency_order
from studio.training.emoji_mar import SIZES as MAR_SIZES
from studio.training.emoji_mar import EmojiMAR
from studio.training.recipe import Defaults

SIZES = {**MAR_SIZES, "head_width": 192, "head_depth": 2, "head_heads": 6}
LEVELS = 32
MEASURED = 2000
"""Pictures whose latents say in which order dimensions are drawn."""
DRAWING = {"default_guidance_scale": 3.0, "default_num_steps": 16}


class TrainableBridge(nn.Module):
    """A TokenBridge, the frozen text encoder whose states it reads, and the quantiser of its tokens."""

    def __init__(self, transformer: TokenBridge, text_encoder, image_tokenizer: TokenBridgeTokenizer):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder.requires_grad_(False)
        self.quantizer = image_tokenizer.quantizer
        self.scale = image_tokenizer.continuous.config.scaling_factor

    def train(self, mode: bool = True) -> "TrainableBridge":
        super().train(mode)
        self.text_encoder.eval()
        return self

    def forward(self, latents, order, masked, input_ids, attention_mask):
        """Mean cross-entropy of latents (B, C, h, w) over the first `masked` cells (1,) of each order (B, L)."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        tokens = self.quantizer.encode((latents * self.scale).flatten(2).transpose(1, 2))
        values = self.quantizer.decode(tokens)
        return self.transformer(tokens, values, order, int(masked), captions=states, caption_mask=attention_mask)


class EmojiBridge(EmojiMAR):
    """Draws an emoji from words, a few cells at a time and each dimension by dimension: latents of `emoji-kl`."""

    name = "emoji-bridge"
    data = "Fluent Emoji on ten backgrounds, without the held-out combinations; random captions, latents of emoji-kl"
    defaults = Defaults(steps=3000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
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
        tokenizer, transformer, text_encoder = (
            copy.deepcopy(part).to(torch.bfloat16).eval()
            for part in (self.bridge, module.transformer, module.text_encoder)
        )
        pipe = TokenBridgePipeline(
            tokenizer, transformer, text_encoder, self.tokenizer, lowercase_prompts=True, **DRAWING
        )
        pipe.save_pretrained(folder)
        if (words := Path(self.text.name_or_path, CONCEPTS_FILE)).is_file():
            shutil.copy(words, folder)
