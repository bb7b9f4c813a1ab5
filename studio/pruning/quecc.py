"""QueCC: an image as 1, 4 or 16 tokens that are made for one question ("Inference Optimal VLMs Need Fewer Visual
Tokens and More Parameters", arXiv:2411.03312).

The question, read by the language model as text alone, becomes a vector that is added to all patches of a square. Each
window of the square becomes one token: a convolution whose kernel is its stride, attention from there to the patches of
that window, and a multilayer perceptron in place of the projector. It has to be trained: `studio train quecc`.

Deviations from the paper: the square is made of the crops of a LLaVA-NeXT, without thumbnail and newlines; tokens have
the positions of the middles of their windows in the whole prompt; logits of the attention are divided by the mean
square of a window's features; one compressor has several numbers of tokens, which share everything but the convolution;
the language model stays as it is.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from PIL import Image
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from studio.checks import check_integer
from studio.errors import StudioError
from studio.pruning.attention import TowerTap
from studio.pruning.shortening import PruneInfo, cut, now, positions_from

FOLDER = "compressor"
"""Where a reader's folder has one."""
TOKENS = (1, 4, 16)


class Compressor(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Makes a few tokens of a square of patches, for a question.

    Args:
        width: of the patches' features.
        text_width: of the language model.
        side: patches of a side of the square.
        tiles: of a side of the square; the vision tower reads each on its own.
        num_heads: of the attention.
        tokens: the numbers of tokens, each a square number whose root divides `side`.

    Raises:
        StudioError: sizes that do not fit together.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        width: int = 160,
        text_width: int = 192,
        side: int = 24,
        tiles: int = 2,
        num_heads: int = 5,
        tokens: tuple[int, ...] = TOKENS,
    ):
        super().__init__()
        if width % num_heads or side % tiles or not tokens:
            raise StudioError("The width of a compressor divides into its heads, and its square into tiles.")
        for count in tokens:
            root = math.isqrt(check_integer("The number of tokens", count, 1, side**2))
            if root**2 != count or side % root:
                fitting = [str(n * n) for n in range(1, side + 1) if side % n == 0]
                raise StudioError(f"{side} x {side} patches become {', '.join(fitting)} tokens, not {count}.")
        self.from_question = nn.Sequential(nn.Linear(text_width, width), nn.GELU(), nn.Linear(width, width))
        self.pool = nn.ModuleDict(
            {
                str(count): nn.Conv2d(width, width, side // math.isqrt(count), side // math.isqrt(count), groups=width)
                for count in tokens
            }
        )
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.linear_1, self.linear_2 = nn.Linear(width, text_width), nn.Linear(text_width, text_width)
        self._begin_as_means()

    @torch.no_grad()
    def _begin_as_means(self):
        """At first a token is the mean of its window, whatever the question."""
        for last in (self.from_question[-1], self.out):
            last.weight.zero_()
        self.from_question[-1].bias.zero_()
        for pool in self.pool.values():
            pool.weight.fill_(1 / pool.weight[0].numel())
            pool.bias.zero_()

    @classmethod
    def for_reader(cls, model: Any, tiles: int = 2, tokens: tuple[int, ...] = TOKENS) -> "Compressor":
        """One that fits a LLaVA-NeXT, and begins with its projector.

        Raises:
            StudioError: another model.
        """
        made = cls(**_sizes(model, tiles), tokens=tokens)
        projector = model.model.multi_modal_projector
        made.linear_1.load_state_dict(projector.linear_1.state_dict())
        made.linear_2.load_state_dict(projector.linear_2.state_dict())
        return made

    def check_fits(self, model: Any) -> None:
        """Raises a `StudioError` where the compressor was not made for such a model."""
        sizes = _sizes(model, self.config.tiles)
        if wrong := [name for name, size in sizes.items() if self.config[name] != size]:
            raise StudioError(f"The compressor was made for another reader: its {wrong[0]} is not {sizes[wrong[0]]}.")

    def forward(self, patches: torch.Tensor, question: torch.Tensor, tokens: int) -> torch.Tensor:
        """Tokens (B, Q, tokens, text_width) of B squares, for Q questions about each.

        Args:
            patches: (B, side * side, width) in raster order.
            question: (B, Q, text_width), from `question_states`.
            tokens: one of the configured numbers.
        """
        pool: Any = self.pool[str(tokens)]
        root = math.isqrt(tokens)
        shift = self.from_question(question)
        square = rearrange(patches, "b (r c) d -> b d r c", r=self.config.side)
        means = rearrange(pool(square), "b d r c -> b 1 (r c) d")
        # the convolution of patches + shift, without as many copies of the patches as there are questions
        pooled = means + shift[:, :, None] * pool.weight.sum(dim=(1, 2, 3))
        windows = rearrange(patches, "b (i r j c) d -> b (i j) (r c) d", i=root, j=root, r=self.config.side // root)
        query, key, value = map(self._heads, (self.query(pooled), self.key(windows), self.value(windows)))
        # the shift adds the same to all logits of a window, and itself to the mean of its values
        size = windows.square().mean(dim=(2, 3))[:, None, :, None, None]  # features of a tower are not of size 1
        logits = torch.einsum("bqnhd,bnphd->bqnhp", query, key) * query.shape[-1] ** -0.5 / size
        mixed = torch.einsum("bqnhp,bnphd->bqnhd", logits.softmax(dim=-1), value).flatten(-2)
        attended = pooled + self.out(mixed + self.value(shift)[:, :, None])
        return self.linear_2(F.gelu(self.linear_1(attended)))

    def _heads(self, x):
        return x.unflatten(-1, (self.config.num_heads, -1))

    def read(self, model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches (B, side * side, width) of images, from LLaVA-NeXT's thumbnails and crops (B, 1 + crops, 3, S, S)."""
        crops = pixel_values[:, 1:]
        tower, layer = model.model.vision_tower, model.config.vision_feature_layer
        with TowerTap(tower, (), feature_layer=layer, has_cls=True):
            seen = tower(crops.flatten(0, 1), output_hidden_states=True)
        patches = seen.hidden_states[layer][:, 1:]
        sizes = {"i": self.config.tiles, "j": self.config.tiles, "r": self.config.side // self.config.tiles}
        return rearrange(patches, "(b i j) (r c) d -> b (i r j c) d", **sizes)

    def check_tokens(self, tokens: int) -> None:
        """Raises a `StudioError` for a number of tokens that it was not trained for."""
        trained = tuple(self.config.tokens)
        if check_integer("tokens", tokens, 1) not in trained:
            counts = ", ".join(map(str, trained))
            raise StudioError(f"This reader compresses an image to {counts} tokens, not to {tokens}.")

    @property
    def prompt_tokens(self) -> int:
        """All tokens that LLaVA-NeXT makes of the square: thumbnail, crops, and a newline for each row."""
        return (self.config.side // self.config.tiles) ** 2 + self.config.side * (self.config.side + 1)

    def places(self, tokens: int) -> torch.Tensor:
        """Places (tokens,) of the windows' middles among all the tokens that LLaVA-NeXT makes of the square."""
        side, root = self.config.side, math.isqrt(tokens)
        middles = torch.arange(root) * (side // root) + side // root // 2
        return (side // self.config.tiles) ** 2 + (middles[:, None] * (side + 1) + middles).flatten()

    def square(self, model: Any, image: Image.Image) -> Image.Image:
        """An image at the size that becomes exactly the square; other proportions are lost."""
        length = self.config.tiles * model.config.vision_config.image_size
        return image if image.size == (length, length) else image.resize((length, length), Image.Resampling.BICUBIC)


def _sizes(model: Any, tiles: int) -> dict[str, int]:
    """The sizes of a compressor for a model."""
    config = model.config
    if config.model_type != "llava_next" or config.vision_config.model_type != "clip_vision_model":
        raise StudioError(
            f"QueCC is for a LLaVA-NeXT with a CLIP tower, such as emoji-vlm, not for {config.model_type}."
        )
    vision, text = config.vision_config, config.get_text_config()
    length = tiles * vision.image_size
    one_layer = isinstance(config.vision_feature_layer, int) and config.vision_feature_select_strategy == "default"
    if not one_layer or [length, length] not in [list(size) for size in config.image_grid_pinpoints]:
        raise StudioError(f"QueCC needs images of {length} x {length} px, and one layer's features without CLS.")
    return {
        "width": vision.hidden_size,
        "text_width": text.hidden_size,
        "side": length // vision.patch_size,
        "tiles": tiles,
        "num_heads": vision.num_attention_heads,
    }


@torch.no_grad()
def compress_inputs(
    model: Any, compressor: Compressor, inputs: Mapping[str, Any], question: torch.Tensor, tokens: int
) -> tuple[dict, PruneInfo]:
    """A prompt with one image, read as a few tokens.

    Args:
        model: the LLaVA-NeXT.
        compressor: made for it.
        inputs: of its processor, for `compressor.square` of the image.
        question: (1, n) ids of the question as text alone, with bos.
        tokens: how many.

    Returns:
        Inputs for `generate`, as of `studio.prune_inputs`.

    Raises:
        StudioError: a number of tokens that the compressor was not trained for.
    """
    compressor.check_tokens(tokens)
    began = now(question.device)
    patches = compressor.read(model, inputs["pixel_values"])
    encoded = now(patches.device)
    state = model.model.language_model(input_ids=question, use_cache=False).last_hidden_state[:, -1:]
    features = compressor(patches, state, tokens)[0]
    image = inputs["input_ids"] == model.config.image_token_id
    keep = ~image
    keep[0, image[0].nonzero()[compressor.places(tokens), 0]] = True
    positions = positions_from(inputs["attention_mask"])
    out = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    out = cut({**out, "position_ids": positions}, keep, 0)
    given: Any = [features]  # a tensor by its type, a list in LLaVA-NeXT
    out["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=given)}
    info = PruneInfo("quecc", tokens / int(image.sum()), [int(image.sum())], [tokens])
    info.seconds.update(encode=encoded - began, select=now(patches.device) - encoded)
    return out, info
