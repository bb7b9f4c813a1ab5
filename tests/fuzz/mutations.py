"""Files and values that nobody meant to give, all from a seeded `random.Random`."""

import io
import json
from functools import cache

import numpy as np
from PIL import Image

ODD_NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    10**9,
    10**11,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
]
ODD_TEXTS = [
    "",
    " ",
    "2",
    "0.1",
    "\ud800",
    "\0",
    "a" * 2001,
    "ä" * 300,
    "🍎",
    "<b>",
    "../..",
    "{}",
    "NaN",
    "x" * 100_000,
]
ODD_JSON = [None, True, False, [], {}, [None], [[]], {"a": 1}, *ODD_NUMBERS, *ODD_TEXTS]


def odd_values():
    """Values for an argument in Python: those of JSON, and what else a program has at hand."""
    import torch

    arrays = [np.int64(2), np.float32(2), np.bool_(True), np.array([1, 2]), np.array(3), torch.tensor(2), torch.ones(2)]
    others = [
        (),
        ("a red apple",),
        ("a red apple", None),
        b"a red apple",
        object(),
        len,
        range(3),
        1j,
        set(),
        iter([1]),
    ]
    return [*ODD_JSON, *arrays, *others]


def mutated(rng, data):
    """Bytes with one to four things wrong."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(data) + 1), rng.randint(1, 8)
        way = rng.randrange(6)
        if way == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif way == 1:
            data[place : place + length] = rng.randbytes(length)
        elif way == 2:
            data[place : place + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\0\0\0\x80", b"\0\0\xff\xff"])
        elif way == 3:
            del data[place : place + rng.choice([1, 4, 64, len(data)])]
        elif way == 4:
            data[place:place] = data[: rng.choice([4, 64])]
        else:
            start = rng.randrange(max(1, min(64, len(data))))
            data[start : start + 2] = rng.randbytes(2)
        if not data:
            break
    return bytes(data)


@cache
def image_files():
    """`(format, bytes)` of small images of every kind that is read, and of some that are not."""
    levels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    rgba, rgb, gray = Image.fromarray(levels), Image.fromarray(levels[..., :3]), Image.fromarray(levels[..., 0])
    deep = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010F] = 6, 72.0, "maker"
    exif.get_ifd(0x8769)[0x829A] = 0.01
    wanted = [
        ("PNG", rgb, {}), ("PNG", rgba, {}), ("PNG", deep, {}), ("PNG", gray.convert("1"), {}),
        ("PNG", rgb.quantize(16), {"transparency": 3}), ("PNG", rgb, {"exif": exif}),
        ("PNG", deep, {"transparency": 257}),
        ("JPEG", rgb, {"exif": exif}), ("JPEG", rgb.convert("CMYK"), {}), ("JPEG", gray, {"progressive": True}),
        ("WEBP", rgb, {"exif": exif}), ("WEBP", rgba, {"lossless": True}),
        ("WEBP", rgb, {"save_all": True, "append_images": [rgba]}),
        ("GIF", rgb.quantize(8), {"save_all": True, "append_images": [rgb.quantize(4)], "transparency": 1}),
        ("BMP", rgb, {}), ("BMP", gray.convert("1"), {}), ("TIFF", rgb, {"exif": exif}), ("TIFF", deep, {}),
        ("TIFF", Image.fromarray(levels[..., 0] / np.float32(255)), {}), ("TIFF", rgba, {"compression": "tiff_lzw"}),
        ("TIFF", rgb, {"compression": "tiff_adobe_deflate"}),
        ("TIFF", rgb, {"save_all": True, "append_images": [gray]}),
        ("TIFF", gray.convert("I"), {}), ("AVIF", rgb, {"exif": exif}), ("AVIF", rgba, {}),
        ("ICO", rgba, {}), ("PPM", rgb, {}), ("TGA", rgb, {}), ("DDS", rgba, {}), ("JPEG2000", rgb, {}),
        ("EPS", rgb, {}),
    ]  # fmt: skip
    files = []
    for form, image, settings in wanted:
        file = io.BytesIO()
        image.copy().save(file, form, **settings)
        files.append((form, file.getvalue()))
    return files


def odd_line(rng, known):
    """A line of JSON with names that are known, and values that hardly ever are right."""
    fields = {"prompt": "a red apple", **{rng.choice(known): rng.choice(ODD_JSON) for _ in range(rng.randint(0, 3))}}
    if rng.random() < 0.1:
        fields[rng.choice(ODD_TEXTS)] = rng.choice(ODD_JSON)
    texts = [json.dumps(fields), json.dumps(fields, ensure_ascii=False), json.dumps([fields]), "[" * 10**5, "9" * 5000]
    line = rng.choice(texts)
    data = line.encode("utf-8", "surrogatepass")
    return mutated(rng, data) if rng.random() < 0.4 else data
