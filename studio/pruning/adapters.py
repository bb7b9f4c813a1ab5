"""What the pruners need to know about each family of vision-language models in transformers.

A family says which tokens belong to one image, where they lie (`Layout`), how attention scores are read off, and in
which form the model takes features back. An image is one entry of the model's `pooler_output`, except:
- InternVL, where it is one run of image tokens in the prompt;
- Idefics and SmolVLM, where all images of one prompt count as one, because the model gives them as one entry;
- Aya Vision, Cohere2 Vision and Ovis2, where it is a tile.
"""

import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from studio.errors import StudioError
from studio.pruning.attention import Attention, QwenTap, TowerTap
from studio.pruning.layout import NEWLINE, Layout
from studio.pruning.registry import SCORES, VIDEO

_CROSS_ATTENTION = ("cross_attention_layers", "cross_layer_interval")
"""What configurations of models that attend to images beside the prompt have."""

_TOWERS = ("clip_vision_model", "siglip_vision_model")


def base_of(model: PreTrainedModel) -> torch.nn.Module:
    """The part that holds vision tower and language model."""
    return model.base_model


class Family:
    """One image for each entry of `pooler_output`, any method that needs no attention."""

    mrope = False
    videos = False

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.base: Any = base_of(model)  # its parts differ from family to family

    def refusal(self, method: str) -> str | None:
        """Why a method that needs attention cannot be used, as the end of a sentence; `None` where it can."""
        return "no scores are read off this family"

    def features(self, encoded: Any, inputs: dict) -> list[torch.Tensor]:
        """The features (T, D) of each image, in the order of the prompt."""
        return list(encoded.pooler_output)

    def layouts(self, features: list[torch.Tensor], inputs: dict) -> list[Layout]:
        return [_square_or_row(len(part)) for part in features]

    def tap(self, names: tuple[str, ...], inputs: dict) -> AbstractContextManager:
        """A context around the vision tower that records what the scores `names` need."""
        return nullcontext()

    def scores(self, tap: Any, inputs: dict, images: int) -> list[Attention]:
        """The scores of each image, from what `tap` recorded; asked of families that refuse no method."""
        return []

    def pooled(self, kept: list[torch.Tensor], row_tokens: list[int]) -> list[torch.Tensor] | torch.Tensor:
        """Features as the model takes them: `kept` for each image, `row_tokens` for each row of the prompt."""
        return kept

    def frames(self, features: list[torch.Tensor], inputs: dict) -> list[int]:
        """The frames of each video; asked where `videos` is true. Tokens after the last whole frame always stay."""
        return [inputs["pixel_values_videos"].shape[1]] * len(features)

    def pooled_videos(self, kept: list[torch.Tensor]) -> list[torch.Tensor] | torch.Tensor:
        """Features of videos as the model takes them."""
        return kept


class Llava(Family):
    """LLaVA-1.5: one square of tokens."""

    def refusal(self, method: str) -> str | None:
        tower = self.base.vision_tower.config.model_type
        if tower not in _TOWERS:
            return f"its vision tower is {tower}, and scores are read from CLIP and SigLIP only"
        if self._strategy({}) == "full" and tower == "clip_vision_model":
            return "it feeds the CLS token to the language model, so that tokens form no grid"
        return None

    def tap(self, names: tuple[str, ...], inputs: dict) -> AbstractContextManager:
        tower = self.base.vision_tower
        if tower.config.model_type not in _TOWERS:
            return nullcontext()
        layer = inputs.get("vision_feature_layer")
        layer = self.model.config.vision_feature_layer if layer is None else layer
        layers = [layer] if isinstance(layer, int) else layer
        has_cls = self._strategy(inputs) == "default"
        return TowerTap(tower, names, feature_layer=layers[-1], read_layers=layers, has_cls=has_cls)

    def scores(self, tap: Any, inputs: dict, images: int) -> list[Attention]:
        return tap.scores([1] * images)

    def _strategy(self, inputs: dict) -> str:
        return inputs.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy


class LlavaNext(Llava):
    """LLaVA-NeXT: thumbnail, crops without padding, a newline after each row of the canvas."""

    def layouts(self, features: list[torch.Tensor], inputs: dict) -> list[Layout]:
        sizes, crops = _pairs(inputs["image_sizes"]), self._crops_of(inputs)
        return [self._layout(*image, inputs) for image in zip(features, sizes, crops)]

    def scores(self, tap: Any, inputs: dict, images: int) -> list[Attention]:
        return tap.scores([1 + crops for crops in self._crops_of(inputs)])

    def _crops_of(self, inputs: dict) -> list[int]:
        return [self._crops(size) for size in _pairs(inputs["image_sizes"])]

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        config = self.model.config
        return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def _crops(self, size: tuple[int, int]) -> int:
        config = self.model.config
        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) - 1

    def _layout(self, features: torch.Tensor, size: tuple[int, int], crops: int, inputs: dict) -> Layout:
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        ids = self._pack(torch.arange((1 + crops) * side**2, dtype=torch.float32).view(-1, side**2, 1), size)
        if len(ids) != len(features):
            return self._other_layout(features, size, crops, side, inputs)
        return Layout.from_ids(ids, (side, side), self._grid(size) if crops else None)

    def _other_layout(self, features, size, crops, side, inputs) -> Layout:
        return Layout.plain(1, len(features))

    def _pack(self, partitions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The model's own packing, of ids instead of features: exact in float32 below 2**24."""
        packed, _ = self.base.pack_image_features(
            [partitions], [size], vision_feature_select_strategy="full", image_newline=torch.tensor([float(NEWLINE)])
        )
        return packed[0][:, 0].round().long()


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT, and videos of pooled frames."""

    videos = True


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: as LLaVA-NeXT, but large canvases are shrunk, and several images in a prompt have no crops.

    A video is one frame after the other and a newline.
    """

    videos = True

    def pooled_videos(self, kept: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(kept)

    def _crops_of(self, inputs: dict) -> list[int]:
        crops, numbers = super()._crops_of(inputs), inputs.get("batch_num_images")
        if numbers is None:
            return crops
        alone = [int(number) == 1 for number in numbers for _ in range(int(number))]
        return [most if single else 0 for most, single in zip(crops, alone)]

    def _other_layout(self, features, size, crops, side, inputs) -> Layout:
        """A shrunk canvas: rows as the newlines show them, tokens that are no longer those of the tower."""
        zeros = torch.zeros(1 + crops, side**2, 1)
        ids = self._pack(zeros, size, inputs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio)
        if len(ids) != len(features):
            return Layout.plain(1, len(features))
        newline, thumbnail = ids == NEWLINE, torch.arange(len(ids)) < side**2
        width = int(newline.nonzero()[0]) - side**2 + 1
        place = torch.where(thumbnail, torch.arange(len(ids)), torch.arange(len(ids)) - side**2)
        across = torch.where(thumbnail, side, width)
        return Layout(
            partition=(~thumbnail).long().masked_fill(newline, NEWLINE),
            row=place.div(across, rounding_mode="floor"),
            column=place.remainder(across).masked_fill(newline, -1),
            size=(side, side),
        )

    def _pack(self, partitions, size, aspect_ratio: str = "anyres_max_1000000") -> torch.Tensor:
        packed, _ = self.base.pack_image_features(
            [partitions],
            [size],
            image_newline=torch.tensor([float(NEWLINE)]),
            vision_aspect_ratio=aspect_ratio,
        )
        return packed[0][:, 0].round().long()


class Qwen(Family):
    """Qwen-VL and GLM-4V: one grid of merged patches, three-axis positions, scores by received attention."""

    mrope = True

    def refusal(self, method: str) -> str | None:
        return None

    def layouts(self, features: list[torch.Tensor], inputs: dict) -> list[Layout]:
        merge = self.base.visual.spatial_merge_size
        return [Layout.plain(t * h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()]

    def tap(self, names: tuple[str, ...], inputs: dict) -> AbstractContextManager:
        return QwenTap(self.base.visual, names, inputs["image_grid_thw"]) if names else nullcontext()

    def scores(self, tap: Any, inputs: dict, images: int) -> list[Attention]:
        return tap.scores()


class QwenVideo(Qwen):
    """Qwen-VL, videos too: a grid of merged patches for each pair of frames."""

    videos = True

    def frames(self, features: list[torch.Tensor], inputs: dict) -> list[int]:
        return inputs["video_grid_thw"][:, 0].tolist()


class Stacked(Family):
    """Families whose images or tiles have equally many tokens, in one tensor."""

    def pooled(self, kept: list[torch.Tensor], row_tokens: list[int]) -> torch.Tensor:
        """One tensor, in equal pieces that never cross a row, so that beams repeat whole rows."""
        return torch.cat(kept).unflatten(0, (-1, math.gcd(*row_tokens)))


class InternVL(Stacked):
    """InternVL: crops, then the thumbnail, each a square of merged patches."""

    def refusal(self, method: str) -> str | None:
        return "the inputs do not tell the grid of its crops, and users found CLS scores worse than chance there"

    def features(self, encoded: Any, inputs: dict) -> list[torch.Tensor]:
        image = (inputs["input_ids"] == self.model.config.image_token_id).tolist()
        runs = [len([*run]) for row in image for is_image, run in groupby(row) if is_image]
        whole = encoded.pooler_output.flatten(0, 1)
        if sum(runs) != len(whole):
            raise StudioError(mismatch(sum(runs), len(whole)))
        return list(whole.split(runs))

    def layouts(self, features: list[torch.Tensor], inputs: dict) -> list[Layout]:
        config = self.model.config
        height, width = (int(part * config.downsample_ratio) for part in _patches(config.vision_config))
        return [_stacked(len(part), height, width) for part in features]


class Rectangles(Family):
    """Mistral3, MiniCPM-V and Gemma4: one grid for each image, in its own proportions."""

    def layouts(self, features: list[torch.Tensor], inputs: dict) -> list[Layout]:
        return [_grid_of(len(part), shape) for part, shape in zip(features, self._shapes(inputs))]

    def _shapes(self, inputs: dict) -> list[tuple[int, int]]:
        """Height and width of each image, in any unit."""
        if inputs.get("image_position_ids") is not None:
            columns, rows = (inputs["image_position_ids"].amax(dim=1) + 1).unbind(-1)
            return [*zip(rows.tolist(), columns.tolist())]
        sizes = inputs.get("target_sizes")
        return _pairs(inputs["image_sizes"] if sizes is None else sizes)


class SmolVLM(Family):
    """Idefics3 and SmolVLM: crops, then the whole image, each a square of merged patches."""

    def refusal(self, method: str) -> str | None:
        return "the grid of its crops is not in the inputs"

    def layouts(self, features: list[torch.Tensor], inputs: dict) -> list[Layout]:
        side = math.isqrt(self.base.image_seq_len)
        return [_stacked(len(part), side, side) for part in features]


FAMILIES: dict[str, type[Family]] = {
    "aria": Stacked,
    "aya_vision": Stacked,
    "cohere2_vision": Stacked,
    "gemma3": Stacked,
    "gemma4": Rectangles,
    "glm4v": Qwen,
    "got_ocr2": Stacked,
    "idefics2": Family,
    "idefics3": SmolVLM,
    "internvl": InternVL,
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_next_video": LlavaNextVideo,
    "llava_onevision": LlavaOnevision,
    "minicpmv4_6": Rectangles,
    "mistral3": Rectangles,
    "ovis2": Stacked,
    "paligemma": Stacked,
    "qwen2_5_vl": QwenVideo,
    "qwen2_vl": QwenVideo,
    "qwen3_vl": QwenVideo,
    "qwen3_vl_moe": QwenVideo,
    "smolvlm": SmolVLM,
    "vipllava": Stacked,
}
"""By `config.model_type`."""


def family_of(model: PreTrainedModel, method: str) -> Family:
    """The family of a model.

    Raises:
        StudioError: a model without images, a family whose tokens cannot be pruned (with the reason), or a method that
            does not work with it.
    """
    model = unwrapped(model)
    name = getattr(getattr(model, "config", None), "model_type", None)
    if reason := _unfit(model):
        raise StudioError(f"Tokens of this {name} model cannot be pruned: {reason}.")
    if name not in FAMILIES:
        raise StudioError(f"Tokens of {name} models cannot be pruned yet: use one of {', '.join(FAMILIES)}.")
    family = FAMILIES[name](model)
    if method in SCORES and (reason := family.refusal(method)):
        raise StudioError(f"{method} does not work with this {name} model because {reason}: use divprune.")
    if method in VIDEO and not family.videos:
        known = ", ".join(name for name, kind in FAMILIES.items() if kind.videos)
        raise StudioError(f"{method} prunes videos, and {name} models are none of {known}.")
    return family


def visual_tokens(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Which of the ids stand for tokens of images or videos; bool of their shape."""
    marks = (getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video"))
    return torch.isin(ids, torch.tensor([mark for mark in marks if mark is not None], device=ids.device))


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`, PEFT and distributed wrappers; any other as it is."""
    while True:
        if getattr(model, "_orig_mod", None) is not None:
            model = model._orig_mod
        elif isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        elif callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def _unfit(model) -> str | None:
    """Why taking image tokens out of the prompt is impossible, or another model than with those tokens masked.

    Raises:
        StudioError: a model that reads no images at all.
    """
    forward = inspect.signature(model.forward).parameters if hasattr(model, "config") else {}
    if not any(name.endswith("pixel_values") for name in forward):
        raise StudioError(f"{type(model).__name__} reads no images: give a vision-language model.")
    text = model.config.get_text_config()
    if any(hasattr(text, name) for name in _CROSS_ATTENTION):
        return "it reads images by cross-attention, and the prompt has no image tokens"
    if others := sorted({kind for kind in getattr(text, "layer_types", None) or () if not kind.endswith("attention")}):
        return f"its {', '.join(others)} layers carry a state from token to token"
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        return "its linear attention layers carry a state from token to token"
    if "mm_encoder_outputs" not in forward:
        return "its class takes no features of images in place of pixels"
    return None


def mismatch(ids: int, features: int, kind: str = "image") -> str:
    """The message that a prompt has another number of tokens than its images or videos have features."""
    return (
        f"The prompt has {ids} {kind} tokens, but the vision tower gives {features}: process text and {kind}s together "
        "with the model's own processor."
    )


def _pairs(image_sizes) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in image_sizes]


def _grid_of(tokens: int, shape: tuple[int, int]) -> Layout:
    """A grid of `tokens` in the proportions of `shape`; a single row where there is none."""
    height = round(math.sqrt(tokens * shape[0] / shape[1]))
    fits = height and tokens % height == 0 and height * shape[1] == tokens // height * shape[0]
    return Layout.plain(height, tokens // height) if fits else Layout.plain(1, tokens)


def _square_or_row(tokens: int) -> Layout:
    side = math.isqrt(tokens)
    return Layout.plain(side, side) if side * side == tokens else Layout.plain(1, tokens)


def _patches(vision_config) -> list[int]:
    sides = []
    for name in ("image_size", "patch_size"):
        side = getattr(vision_config, name)
        sides.append(list(side) if isinstance(side, (list, tuple)) else [side, side])
    return [pixels // patch for pixels, patch in zip(*sides)]


def _stacked(tokens: int, height: int, width: int) -> Layout:
    """Crops one below the other, then the thumbnail: the true grid is not known, and uniform pruning needs none."""
    crops, rest = divmod(tokens, height * width)
    if rest or not crops:
        return Layout.plain(1, max(tokens, 1))
    ids = torch.arange(tokens).roll(-height * width) if crops > 1 else torch.arange(tokens)
    return Layout.from_ids(ids, (height, width), (crops - 1, 1) if crops > 1 else None)
