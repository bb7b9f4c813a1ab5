"""Odd files, lines and values: each is taken or refused with a `StudioError`, and nothing else is ever raised.

The whole run is `pytest -m slow tests/fuzz -s`, which prints what became of how many; the usual suite runs some.
Every case has a generator of its own, seeded by its kind and number, so that one that fails can be run alone.
"""

import io
import random
import struct
import time
import zlib
from collections import Counter
from copy import deepcopy
from dataclasses import fields

import pytest

from studio.errors import StudioError
from tests.fuzz.mutations import ODD_JSON, image_files, mutated, odd_line, odd_values

FULL = {"image": 10_000, "odp": 5_000, "recalled": 3_000, "prompts": 4_000, "value": 1_000}
SHORT = {"image": 300, "odp": 200, "recalled": 150, "prompts": 200, "value": 150}
LONGEST = 20
"""Seconds that a case may take on a busy machine."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory, tiny_one_d, tiny_pipeline, tiny_mar_pipeline, tiny_resgen_pipeline):
    """What is done with the generator of a case, by kind."""

    file = tmp_path_factory.mktemp("fuzz") / "file"
    pipelines = [tiny_pipeline, tiny_mar_pipeline, tiny_resgen_pipeline]
    for pipe in pipelines:
        pipe.set_progress_bar_config(disable=True)
    return {
        "image": lambda rng: read_image(rng, file),
        "odp": lambda rng: restore(rng, tiny_one_d),
        "recalled": lambda rng: recall(rng, file.with_suffix(".png")),
        "prompts": lambda rng: read_lines(rng, file.with_suffix(".jsonl")),
        "value": lambda rng: give_value(rng, pipelines, tiny_one_d),
    }


def run(kind, case, count):
    """What became of `count` cases. Fails with those that raised anything but a `StudioError`, or took too long."""
    outcomes, wrong = Counter(), []
    for number in range(count):
        began = time.monotonic()
        try:
            case(random.Random(f"{kind} {number}"))
            outcomes["taken"] += 1
        except StudioError as error:
            outcomes["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 1000:
                wrong.append((number, f"no sentence: {str(error)[:200]!r}"))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the compiled parts of tokenizers raise what is no Exception
            wrong.append((number, f"{type(error).__name__}: {error}"[:300]))
        if time.monotonic() - began > LONGEST:
            wrong.append((number, f"{time.monotonic() - began:.0f} seconds"))
    print(f"\n{kind}: {count} cases, {dict(outcomes)}, {len(wrong)} wrong")
    assert not wrong, f"{len(wrong)} of {count}, first {wrong[:5]}"
    assert outcomes["taken"] and outcomes["refused"], "cases of one outcome alone test little"


@pytest.mark.parametrize("kind", SHORT)
def test_some_odd_inputs(cases, kind):
    run(kind, cases[kind], SHORT[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_all_odd_inputs(cases, kind):
    run(kind, cases[kind], FULL[kind])


def test_a_raw_exception_is_found():
    def case(rng):
        if rng.random() < 0.5:
            raise StudioError("Give another one.")
        return int(rng.choice(["1", "one"]))

    with pytest.raises(AssertionError, match="ValueError"):
        run("control", case, 50)


def read_image(rng, file):
    from PIL import Image

    from studio.images import open_image, rgb_image

    _, data = rng.choice(image_files())
    file.write_bytes(mutated(rng, data) if rng.random() < 0.95 else data)
    if rng.random() < 0.7:
        read = open_image(file, "the image")
    else:
        try:
            opened = Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"))
        except Exception as error:
            raise StudioError("Pillow refuses it before we see it.") from error
        read = rgb_image(opened, "the image")
    assert read.mode == "RGB" and min(read.size) >= 1 and not read.info


def restore(rng, tokenizer):
    from studio import OdpFile, decode_image
    from studio.pipelines.image_codec import token_bits, tokenizer_checksum

    side, most = tokenizer.config.sample_size, tokenizer.config.num_tokens
    width, height = rng.choice([(side, side), (3 * side - 1, side), (1, 1), (40, 2 * side)])
    tiled = rng.random() < 0.5
    tiles = -(-width // side) * -(-height // side) if tiled else 1
    count, bits = rng.randint(tiles, tiles * most), token_bits(tokenizer)
    tokens = tuple(rng.randrange(tokenizer.config.codebook_size) for _ in range(count))
    data = OdpFile("", tokenizer_checksum(tokenizer), width, height, tiled, bits, tokens).to_bytes()
    if rng.random() < 0.9:
        content = data[:-4]
        wrong = mutated(rng, content)
        data = wrong + struct.pack(">I", zlib.crc32(wrong)) if rng.random() < 0.8 else mutated(rng, data)
    image = decode_image(data, tokenizer)
    assert image.mode == "RGB"


def recall(rng, file):
    from PIL import Image

    from studio.saving import png_writer
    from studio.ui.server.png_metadata import from_image

    call = {"model": "emoji-ar", "prompt": "a red apple", "num_images": 1, "decoding": {"name": "ar"}}
    seed = 3
    for _ in range(rng.randint(0, 3)):
        name = rng.choice([*call, "guidance_scale", "top_k", "temperature", "seed", "call"])
        value = deepcopy(rng.choice([value for value in ODD_JSON if value != "\ud800"]))
        if name == "seed":
            seed = value
        elif name == "call":
            call = value if isinstance(value, dict) else call
        else:
            call[name] = value
    written = io.BytesIO()
    png_writer(Image.new("RGB", (16, 16)), call, seed)(written)
    file.write_bytes(mutated(rng, written.getvalue()) if rng.random() < 0.5 else written.getvalue())
    from_image(file)


def read_lines(rng, file):
    from studio.commands.prompt_file import _KINDS, read_prompts

    lines = [odd_line(rng, list(_KINDS)) for _ in range(rng.randint(1, 2))]
    file.write_bytes(b"\n".join(lines))
    read_prompts(file)


def give_value(rng, pipelines, tokenizer):
    import torch
    from PIL import Image

    import studio

    value, what = rng.choice(odd_values()), rng.randrange(4)
    if what == 0:
        kinds = [
            studio.Lantern, studio.LanternPlusPlus, studio.Distilled, studio.Speculative, studio.Autoregressive,
            studio.MaskedAutoregressive, studio.ContinuousSpeculative, studio.ResGenDecoding, studio.DimensionWise,
        ]  # fmt: skip
        kind = rng.choice(kinds)
        kind(**{rng.choice(fields(kind)).name: value})
    elif what == 1:
        name = rng.choice(list(studio.DECODINGS))
        option = rng.choice([*(option.name for option in studio.DECODINGS[name].options), "steps", "delta"])
        studio.decoding_named(name).settings(**{option: value})
    elif what == 2:
        names = ["length", "psnr", "size", "refine", "name", "tile", "image"]
        given = {"image": Image.new("RGB", (20, 20)), rng.choice(names): value}
        if isinstance(given.get("refine"), int):
            given["refine"] = min(given["refine"], 2) if given["refine"] <= 10_000 else given["refine"]
        studio.encode_image(given.pop("image"), tokenizer, **given)
    else:
        pipe = rng.choice(pipelines)
        names = [
            "prompt", "class_labels", "num_images_per_prompt", "guidance_scale", "temperature", "top_k", "top_p",
            "cfg_interval", "num_tokens", "num_inference_steps", "generator", "decoding", "output_type",
            "negative_prompt", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
        ]  # fmt: skip
        given = {"prompt": "a red apple", "generator": torch.Generator().manual_seed(0), rng.choice(names): value}
        pipe(**given)
