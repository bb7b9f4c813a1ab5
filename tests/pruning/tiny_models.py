"""Tiny random models of seven families, with prompts as their processors make them."""

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE, VIDEO, START, END, PAD = 99, 98, 97, 96, 0
TEXT = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=4096,
)
CLIP = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=4
)
PINPOINTS = [[48, 48], [24, 48], [48, 24], [24, 72], [72, 24]]
SIZES = {"square": (48, 48), "wide": (20, 48), "tall": (60, 40), "strip": (24, 70)}


def ready(model):
    """Larger weights, so that attention is not flat and images change the answer; no early end."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith(("class_embedding", "image_newline")):
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


class Tiny:
    """`model`, and `prompt(rows)`: inputs for rows of images."""

    def prompt(self, rows=((0,),), text=5, seed=0, labels=False, side="left"):
        """Rows of image numbers; each image gets its own pixels, the text after it differs from row to row."""
        sample = torch.Generator().manual_seed(seed)
        numbers = [number for row in rows for number in row]
        images, extra = self.pixels(rows, numbers)
        counts = iter(self.counts(numbers, rows))
        lines = []
        for row in rows:
            line = [1, *torch.randint(3, 90, (3,), generator=sample).tolist()]
            for _ in row:
                line += self.around(next(counts)) + torch.randint(3, 90, (2,), generator=sample).tolist()
            lines.append(line + torch.randint(3, 90, (text,), generator=sample).tolist())
        longest = max(map(len, lines))
        pads = [longest - len(line) for line in lines]
        left = side == "left"
        ids = [[PAD] * n + line if left else line + [PAD] * n for n, line in zip(pads, lines)]
        mask = [[0] * n + [1] * len(line) if left else [1] * len(line) + [0] * n for n, line in zip(pads, lines)]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **images, **extra}
        if labels:
            inputs["labels"] = inputs["input_ids"].masked_fill(
                (inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100
            )
        if self.kinds:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return inputs

    kinds = False

    def around(self, count):
        return [START, *[IMAGE] * count, END]

    def sample(self, number, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + number))


class Llava15(Tiny):
    def __init__(self, attention="sdpa", vision=None):
        config = LlavaConfig(
            vision_config=vision or CLIPVisionConfig(**CLIP),
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
        )
        self.model = ready(LlavaForConditionalGeneration._from_config(config, attn_implementation=attention))

    def pixels(self, rows, numbers):
        return {"pixel_values": torch.stack([self.sample(number, 3, 24, 24) for number in numbers])}, {}

    def counts(self, numbers, rows):
        return [36] * len(numbers)


class LlavaNext(Tiny):
    sizes = list(SIZES.values())

    def __init__(self, attention="sdpa", text=TEXT):
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**CLIP),
            text_config=LlamaConfig(**text),
            image_token_id=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-2,
        )
        self.model = ready(LlavaNextForConditionalGeneration._from_config(config, attn_implementation=attention))

    def size(self, number):
        return self.sizes[number % len(self.sizes)]

    def crops(self, number):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return image_size_to_num_patches(self.size(number), PINPOINTS, 24)

    def pixels(self, rows, numbers):
        most = max(self.crops(number) for number in numbers)
        pixels = torch.zeros(len(numbers), most, 3, 24, 24)
        for at, number in enumerate(numbers):
            pixels[at, : self.crops(number)] = self.sample(number, self.crops(number), 3, 24, 24)
        sizes = torch.tensor([self.size(number) for number in numbers])
        return {"pixel_values": pixels, "image_sizes": sizes}, {}

    def counts(self, numbers, rows):
        images, extra = self.pixels(rows, numbers)
        with torch.no_grad():
            return [len(part) for part in self.model.model.get_image_features(**images, **extra).pooler_output]


class LlavaOnevision(LlavaNext):
    def __init__(self, attention="sdpa", aspect="anyres_max_9"):
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**CLIP, vision_use_head=False),
            text_config=Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=aspect,
        )
        self.model = ready(LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attention))

    def pixels(self, rows, numbers):
        images, _ = super().pixels(rows, numbers)
        return images, {"batch_num_images": torch.tensor([len(row) for row in rows])}


class Qwen25(Tiny):
    kinds = True
    grids = [(1, 8, 8), (1, 4, 12), (1, 12, 8)]
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

    def __init__(self, attention="sdpa"):
        config = Qwen2_5_VLConfig(
            vision_config=dict(
                depth=3,
                hidden_size=32,
                intermediate_size=32,
                num_heads=2,
                out_hidden_size=32,
                patch_size=4,
                window_size=16,
                fullatt_block_indexes=[1],
            ),
            text_config={**TEXT, "rope_parameters": self.rope},
            **self.tokens(),
        )
        self.model = ready(Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention))

    def tokens(self):
        return dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)

    def grid(self, number):
        return self.grids[number % len(self.grids)]

    def pixels(self, rows, numbers):
        patches = [
            self.sample(number, self.grid(number)[1] * self.grid(number)[2], 3 * 2 * 4 * 4) for number in numbers
        ]
        grids = torch.tensor([self.grid(number) for number in numbers])
        return {"pixel_values": torch.cat(patches), "image_grid_thw": grids}, {}

    def counts(self, numbers, rows):
        return [self.grid(number)[1] * self.grid(number)[2] // 4 for number in numbers]


class Qwen3(Qwen25):
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}

    def __init__(self, attention="sdpa"):
        config = Qwen3VLConfig(
            vision_config=dict(
                depth=3,
                hidden_size=32,
                intermediate_size=32,
                num_heads=2,
                out_hidden_size=32,
                patch_size=4,
                num_position_embeddings=64,
                deepstack_visual_indexes=[0, 1],
            ),
            text_config={**TEXT, "head_dim": 16, "rope_parameters": self.rope},
            **self.tokens(),
        )
        self.model = ready(Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=attention))


class InternVL(Tiny):
    tiles = [1, 3, 5]

    def __init__(self, attention="sdpa"):
        vision = InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[24, 24],
            patch_size=[4, 4],
        )
        config = InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=9
        )
        self.model = ready(InternVLForConditionalGeneration._from_config(config, attn_implementation=attention))

    def number_of_tiles(self, number):
        return self.tiles[number % len(self.tiles)]

    def pixels(self, rows, numbers):
        return {"pixel_values": torch.cat([self.sample(n, self.number_of_tiles(n), 3, 24, 24) for n in numbers])}, {}

    def counts(self, numbers, rows):
        return [9 * self.number_of_tiles(number) for number in numbers]


class SmolVLM(Tiny):
    tiles = [5, 1, 3]

    def __init__(self, attention="sdpa"):
        config = SmolVLMConfig(
            vision_config={**CLIP, "model_type": "smolvlm_vision"},
            text_config={**TEXT, "model_type": "llama"},
            image_token_id=IMAGE,
            scale_factor=2,
        )
        self.model = ready(SmolVLMForConditionalGeneration._from_config(config, attn_implementation=attention))

    def number_of_tiles(self, number):
        return self.tiles[number % len(self.tiles)]

    def pixels(self, rows, numbers):
        groups = [torch.cat([self.sample(n, self.number_of_tiles(n), 3, 24, 24) for n in row]) for row in rows]
        pixels = torch.zeros(len(rows), max(map(len, groups)), 3, 24, 24)
        for row, group in zip(pixels, groups):
            row[: len(group)] = group
        return {"pixel_values": pixels}, {}

    def around(self, count):
        line = [START]
        for tile in range(count // 9):
            line += [90 + tile % 4, *[IMAGE] * 9, START]
        return line

    def counts(self, numbers, rows):
        return [9 * self.number_of_tiles(number) for number in numbers]
