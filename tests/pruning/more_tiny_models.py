"""Tiny random models of the families beyond the first seven."""

import torch
import transformers

from tests.pruning.tiny_models import (
    CLIP,
    END,
    IMAGE,
    PINPOINTS,
    START,
    TEXT,
    VIDEO,
    LlavaNext,
    Qwen3,
    Qwen25,
    SmolVLM,
    Tiny,
    ready,
)

INDICATORS = [91, 92, 93, 94, 95]
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=512)


def _made(name, attention, **config):
    config = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}ForConditionalGeneration")
    return ready(model._from_config(config, attn_implementation=attention))


class Squares(Tiny):
    """One square of `tokens` tokens for each image of 24 x 24 pixels."""

    tokens = 36

    def pixels(self, rows, numbers):
        return {"pixel_values": torch.stack([self.sample(number, 3, 24, 24) for number in numbers])}, {}

    def counts(self, numbers, rows):
        return [self.tokens] * len(numbers)


class VipLlava(Squares):
    def __init__(self, attention="sdpa"):
        vision = {"model_type": "clip_vision_model", **CLIP}
        text = {"model_type": "llama", **TEXT}
        layers = (-2, -1)
        self.model = _made(
            "VipLlava",
            attention,
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            vision_feature_layer=layers,
        )


class TypedSquares(Squares):
    """A prompt that says which tokens are of an image in `token_type_ids`."""

    def prompt(self, *arguments, **keywords):
        inputs = super().prompt(*arguments, **keywords)
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        return inputs


class Gemma3(TypedSquares):
    tokens = 9

    def __init__(self, attention="sdpa"):
        vision = {"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False}
        text = {**TEXT, **SLIDING, "head_dim": 16, "eos_token_id": None}
        self.model = _made(
            "Gemma3",
            attention,
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            mm_tokens_per_image=9,
            boi_token_index=START,
            eoi_token_index=END,
        )


class PaliGemma(TypedSquares):
    def __init__(self, attention="sdpa"):
        vision = {"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False}
        text = {"model_type": "gemma", **TEXT, "head_dim": 16}
        self.model = _made(
            "PaliGemma",
            attention,
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            projection_dim=32,
            hidden_size=32,
        )


class AyaVision(Squares):
    tokens = 9

    def __init__(self, attention="sdpa"):
        vision = {"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False}
        text = {"model_type": "cohere2", **TEXT, **SLIDING}
        self.model = _made("AyaVision", attention, vision_config=vision, text_config=text, image_token_index=IMAGE)


class Cohere2Vision(Squares):
    tokens = 9

    def __init__(self, attention="sdpa"):
        vision = {"model_type": "siglip_vision_model", **CLIP, "vision_use_head": False}
        text = {"model_type": "cohere2", **TEXT, **SLIDING}
        self.model = _made(
            "Cohere2Vision",
            attention,
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            alignment_intermediate_size=32,
        )


class GotOcr2(Squares):
    tokens = 16

    def __init__(self, attention="sdpa"):
        vision = dict(
            hidden_size=16,
            output_channels=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=4,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=16,
        )
        self.model = _made(
            "GotOcr2",
            {"vision_config": "eager", "text_config": attention},
            vision_config=vision,
            text_config={"model_type": "qwen2", **TEXT},
            image_token_index=IMAGE,
            image_seq_length=16,
        )

    def pixels(self, rows, numbers):
        return {"pixel_values": torch.stack([self.sample(number, 3, 64, 64) for number in numbers])}, {}


class Aria(Squares):
    tokens = 9

    def __init__(self, attention="sdpa"):
        vision = {"model_type": "idefics3_vision", **CLIP}
        text = {**TEXT, "moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1}
        self.model = _made(
            "Aria",
            attention,
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            projector_patch_to_query_dict={36: 9},
        )


class Ovis2(Squares):
    tokens = 9

    def __init__(self, attention="sdpa"):
        vision = dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=4,
            vocab_size=40,
            hidden_stride=2,
        )
        self.model = _made(
            "Ovis2",
            attention,
            vision_config=vision,
            text_config={"model_type": "qwen2", **TEXT},
            image_token_id=IMAGE,
            visual_indicator_token_ids=INDICATORS,
            vocab_size=100,
            hidden_size=32,
        )

    def around(self, count):
        return [INDICATORS[0], *[IMAGE] * count, INDICATORS[1]]


class Idefics3(SmolVLM):
    def __init__(self, attention="sdpa"):
        self.model = _made(
            "Idefics3",
            attention,
            vision_config=CLIP,
            text_config={"model_type": "llama", **TEXT},
            image_token_id=IMAGE,
            scale_factor=2,
        )


class Idefics2(SmolVLM):
    tokens = 4

    def __init__(self, attention="sdpa"):
        perceiver = dict(
            hidden_size=32,
            resampler_n_latents=9,
            resampler_depth=1,
            resampler_n_heads=2,
            resampler_head_dim=16,
            num_key_value_heads=1,
        )
        self.model = _made(
            "Idefics2",
            attention,
            vision_config=CLIP,
            perceiver_config=perceiver,
            text_config={"model_type": "mistral", **TEXT},
            image_token_id=IMAGE,
        )


class Mistral3(Tiny):
    sizes = [(48, 48), (32, 48), (48, 16)]

    def __init__(self, attention="sdpa"):
        vision = {"model_type": "pixtral", **CLIP, "image_size": 48, "head_dim": 8}
        self.model = _made(
            "Mistral3",
            attention,
            vision_config=vision,
            text_config={"model_type": "mistral", **TEXT, "head_dim": 16},
            image_token_index=IMAGE,
        )

    def size(self, number):
        return self.sizes[number % len(self.sizes)]

    def pixels(self, rows, numbers):
        pixels = torch.zeros(len(numbers), 3, 48, 48)
        for at, number in enumerate(numbers):
            height, width = self.size(number)
            pixels[at, :, :height, :width] = self.sample(number, 3, height, width)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([self.size(number) for number in numbers])}, {}

    def counts(self, numbers, rows):
        return [self.size(number)[0] * self.size(number)[1] // 64 for number in numbers]


class LlavaNextVideo(LlavaNext):
    def __init__(self, attention="sdpa"):
        self.model = _made(
            "LlavaNextVideo",
            attention,
            vision_config={"model_type": "clip_vision_model", **CLIP},
            text_config={"model_type": "llama", **TEXT},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        )


class Qwen2(Qwen25):
    def __init__(self, attention="sdpa"):
        vision = dict(depth=3, embed_dim=32, hidden_size=32, mlp_ratio=1, num_heads=2, patch_size=4)
        text = {**TEXT, "rope_parameters": self.rope}
        self.model = _made("Qwen2VL", attention, vision_config=vision, text_config=text, **self.tokens())


class Qwen3Moe(Qwen3):
    def __init__(self, attention="sdpa"):
        vision = dict(
            depth=3,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=32,
            patch_size=4,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        )
        text = {
            **TEXT,
            "head_dim": 16,
            "rope_parameters": self.rope,
            "moe_intermediate_size": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
        }
        self.model = _made("Qwen3VLMoe", attention, vision_config=vision, text_config=text, **self.tokens())


class Glm4v(Qwen25):
    def __init__(self, attention="sdpa"):
        vision = dict(
            depth=3,
            hidden_size=32,
            num_heads=2,
            image_size=32,
            patch_size=4,
            out_hidden_size=32,
            intermediate_size=32,
        )
        text = {**TEXT, "rope_parameters": {**self.rope, "partial_rotary_factor": 1.0}}
        tokens = dict(
            image_start_token_id=START, image_end_token_id=END, video_start_token_id=90, video_end_token_id=91
        )
        self.model = _made(
            "Glm4v",
            attention,
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **tokens,
        )


class MiniCPM(Tiny):
    grids = [(16, 16), (8, 16), (16, 12)]

    def __init__(self, attention="sdpa"):
        vision = {**CLIP, "image_size": 64, "num_hidden_layers": 2, "insert_layer_id": 0}
        text = {**TEXT, "model_type": "qwen3_5_text", "head_dim": 16, "layer_types": ["full_attention"] * 2}
        self.model = _made(
            "MiniCPMV4_6",
            attention,
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            insert_layer_id=0,
        )

    def grid(self, number):
        return self.grids[number % len(self.grids)]

    def pixels(self, rows, numbers):
        strips = [self.sample(number, 3, 4, 4 * self.grid(number)[0] * self.grid(number)[1]) for number in numbers]
        sizes = torch.tensor([self.grid(number) for number in numbers])
        return {"pixel_values": torch.cat(strips, dim=-1)[None], "target_sizes": sizes}, {}

    def counts(self, numbers, rows):
        return [self.grid(number)[0] * self.grid(number)[1] // 16 for number in numbers]


class Gemma4(Tiny):
    kinds = True
    grids = [(10, 10), (6, 10), (10, 4)]

    def __init__(self, attention="sdpa"):
        vision = dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            pooling_kernel_size=2,
            patch_size=4,
            position_embedding_size=64,
        )
        text = {
            **TEXT,
            **SLIDING,
            "head_dim": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 100,
            "use_bidirectional_attention": "vision",
        }
        self.model = _made(
            "Gemma4",
            attention,
            vision_config=vision,
            text_config=text,
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            boi_token_id=START,
            eoi_token_id=END,
            audio_token_id=90,
        )

    def grid(self, number):
        return self.grids[number % len(self.grids)]

    def pixels(self, rows, numbers):
        pixels = torch.zeros(len(numbers), 100, 48)
        places = torch.full((len(numbers), 100, 2), -1)
        for at, number in enumerate(numbers):
            height, width = self.grid(number)
            pixels[at, : height * width] = self.sample(number, height * width, 48).sigmoid()
            rows_, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            places[at, : height * width] = torch.stack((columns.flatten(), rows_.flatten()), dim=-1)
        return {"pixel_values": pixels, "image_position_ids": places}, {}

    def counts(self, numbers, rows):
        return [self.grid(number)[0] * self.grid(number)[1] // 4 for number in numbers]


MORE_FAMILIES = {
    "aria": Aria,
    "aya_vision": AyaVision,
    "cohere2_vision": Cohere2Vision,
    "gemma3": Gemma3,
    "gemma4": Gemma4,
    "glm4v": Glm4v,
    "got_ocr2": GotOcr2,
    "idefics2": Idefics2,
    "idefics3": Idefics3,
    "llava_next_video": LlavaNextVideo,
    "minicpmv4_6": MiniCPM,
    "mistral3": Mistral3,
    "ovis2": Ovis2,
    "paligemma": PaliGemma,
    "qwen2_vl": Qwen2,
    "qwen3_vl_moe": Qwen3Moe,
    "vipllava": VipLlava,
}
