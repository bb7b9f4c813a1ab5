"""Rate and distortion of a One-D-Piece tokenizer, JPEG and WebP.

What is counted: whole files, `.odp` files with header and checksum too; and, in a second curve, what is left of each
without its fixed parts. JPEG then has no tables, WebP no container and no frame header, `.odp` only packed tokens.
Every file is at most as large as the tokenizer's of that row, or as a larger limit. JPEG (4:2:0, optimised tables) and
WebP (lossy, slowest method) may shrink an image before they encode it; of each image the file is taken, over scales
and qualities, that fits and restores it best. The tokenizer has no entropy coder, and its weights are not counted; its
tokens may be searched for each image, as the other codecs' files are.

The figure of `studio bench rate-distortion`.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from studio.bench.chart import Series, chart
from studio.checks import check_integer
from studio.data.archive import STYLES, load_images
from studio.data.backgrounds import PALETTE, compose
from studio.data.splits import concepts
from studio.errors import StudioError
from studio.evaluation.judge import judge_scores, load_judge
from studio.evaluation.metrics import frechet_distance
from studio.pipelines.image_codec import image_psnr, token_bits
from studio.pipelines.odp_file import OdpFile
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.refinement import check_steps, refined_tokens


def rate_distortion_chart(rows: list[dict], measure: str = "psnr") -> str:
    """Mean PSNR, or the judge's distance (`"frechet"`), over mean bytes, as an SVG document.

    A line for each codec and way of counting.
    """
    series = []
    for counted in COUNTED:
        for codec in dict.fromkeys(row["codec"] for row in rows):
            some = [row for row in rows if (row["codec"], row["counted"]) == (codec, counted)]
            points = tuple(sorted((row["bytes"], row[measure]) for row in some))
            if points:
                name = codec.removeprefix("one-d-piece ")
                series.append(Series(name if counted == "file" else f"{name} payload", points))
    quality = "PSNR in dB" if measure == "psnr" else "distance of the judge's features"
    return chart("Held-out images from few bytes", "bytes an image", quality, series, log_x=True)


SCALES = (1, 2, 4, 8)
QUALITIES = (1, 2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95)
LARGER = (1.5, 2, 3, 4)
"""Limits beyond the tokenizer's largest file, as multiples of it, to show where the others begin."""
COUNTED = ("file", "without fixed parts")
WEBP_FIXED = 30
"""RIFF header, chunk header and VP8 frame header."""
_BATCH = 34


@dataclass(frozen=True)
class Encoded:
    """One way to encode one image: bytes of the file and of its fixed parts, and the decoded image.

    `psnr` is in dB over 8-bit RGB.
    """

    size: int
    fixed: int
    restored: Image.Image
    psnr: float


def bench_rate_distortion(
    tokenizer: ModelMixin,
    *,
    name: str = "",
    samples: int = 136,
    refine: int = 0,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> dict:
    """Compare a tokenizer with JPEG and WebP at equal bytes, on images of held-out concepts.

    Args:
        tokenizer: a One-D-Piece tokenizer, on its device.
        name: its bundled name, which a file of it holds; empty for another.
        samples: how many images; more than the judge's features have numbers (64).
        refine: steps of a search for better tokens (`studio.tokenizers.refinement`), in rows of their own; none with 0.
        seed: chooses styles and backgrounds.
        device: where the judge runs.

    Returns:
        `{"rows": [...], "samples", "refine", "seed", "resolution"}`. A row is `{"codec", "counted", "limit", "bytes",
        "psnr", "frechet"}`: the most bytes an image may have, the mean bytes it has, the mean PSNR in dB, and the
        distance of the judge's features from those of the originals. Where not every image fits there is no row.

    Raises:
        StudioError: another kind of tokenizer, more images than there are, or a number of steps that is none.
    """
    if not isinstance(tokenizer, OneDPieceTokenizer):
        raise StudioError("Rate and distortion are measured of One-D-Piece tokenizers: their files can be shortened.")
    refine = check_steps(refine)
    images = held_out_images(tokenizer.config.sample_size, samples, seed)
    judge = load_judge(device=device)
    truth = _features(judge, images)
    ours = {
        codec: [_by_tokens(tokenizer, images, length, name, steps) for length in tokenizer.lengths]
        for codec, steps in {"one-d-piece": 0, f"one-d-piece refined {refine}": refine}.items()
        if steps or codec == "one-d-piece"
    }
    others = {codec: [ways(image, codec) for image in images] for codec in ("jpeg", "webp")}
    rows = []
    for counted in COUNTED:
        limits = [_counted(some[0], counted) for some in ours["one-d-piece"]]
        for codec, of_lengths in ours.items():
            for limit, some in zip(limits, of_lengths):
                rows.append(_row(codec, counted, limit, some, judge, truth))
        for codec, of_images in others.items():
            for limit in (*limits, *(int(limits[-1] * factor) for factor in LARGER)):
                chosen = [best(each, limit, counted) for each in of_images]
                if None not in chosen:
                    rows.append(_row(codec, counted, limit, chosen, judge, truth))
    sizes = {"samples": samples, "refine": refine, "seed": seed, "resolution": tokenizer.config.sample_size}
    return {"rows": rows, **sizes}


def held_out_images(side: int, samples: int, seed: int) -> list[Image.Image]:
    """Images of concepts that no tokenizer was trained with, each with a style and a background sampled by seed."""
    kept = concepts(held_out=True)
    cases = [(concept, style) for concept in kept for style in range(len(STYLES))]
    if not 1 <= check_integer("The number of samples", samples) <= len(cases):
        raise StudioError(f"There are {len(cases)} images of held-out concepts; {samples} cannot be sampled.")
    rng = np.random.default_rng(seed)
    sampled = np.array(cases)[rng.permutation(len(cases))[:samples]]
    colours = PALETTE[rng.integers(len(PALETTE), size=samples)]
    images = compose(load_images(side)[sampled[:, 0], sampled[:, 1]], colours)
    return [Image.fromarray(image) for image in (images * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)]


def ways(image: Image.Image, codec: str) -> list[Encoded]:
    """An image in every scale and quality of `"jpeg"` or `"webp"`."""
    encoded = []
    for scale in SCALES:
        small = image.resize([max(1, side // scale) for side in image.size], Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            file = io.BytesIO()
            if codec == "jpeg":
                small.save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
            else:
                small.save(file, "WEBP", quality=quality, method=6)
            data = file.getvalue()
            restored = Image.open(io.BytesIO(data)).convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
            fixed = jpeg_fixed(data) if codec == "jpeg" else WEBP_FIXED
            encoded.append(Encoded(len(data), fixed, restored, image_psnr(restored, image)))
    return encoded


def jpeg_fixed(data: bytes) -> int:
    """Bytes of a baseline JPEG file around its entropy-coded scan."""
    place = 2
    while data[place + 1] != 0xDA:
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return place + 2 + int.from_bytes(data[place + 2 : place + 4], "big") + len(b"\xff\xd9")


def best(encoded: list[Encoded], limit: int, counted: str) -> Encoded | None:
    """What restores an image best among those of at most `limit` bytes; None when there are none."""
    return max((way for way in encoded if _counted(way, counted) <= limit), key=lambda way: way.psnr, default=None)


def _counted(way: Encoded, counted: str) -> int:
    return way.size - (way.fixed if counted != "file" else 0)


def _by_tokens(tokenizer, originals, length, name, refine) -> list[Encoded]:
    """The images restored from their first tokens; their files are equally long, whatever the tokens are."""
    side, encoded = tokenizer.config.sample_size, []
    file = OdpFile(name, 0, side, side, False, token_bits(tokenizer), (0,) * length)
    size = len(file.to_bytes())
    for start in range(0, len(originals), _BATCH):
        some = originals[start : start + _BATCH]
        images = _pixels(some).to(tokenizer.device, tokenizer.dtype) / 127.5 - 1
        tokens, _ = refined_tokens(tokenizer, images, [length] * len(some), refine)
        with torch.no_grad():
            restored = ((tokenizer.decode(tokens, length).float() + 1).clamp(0, 2) * 127.5).round().to(torch.uint8)
        for original, pixels in zip(some, restored.movedim(1, -1).cpu().numpy()):
            image = Image.fromarray(pixels)
            encoded.append(Encoded(size, size - file.payload_bytes, image, image_psnr(image, original)))
    return encoded


def _row(codec, counted, limit, chosen, judge, truth) -> dict:
    return {
        "codec": codec,
        "counted": counted,
        "limit": limit,
        "bytes": float(np.mean([_counted(way, counted) for way in chosen])),
        "psnr": float(np.mean([min(way.psnr, 99.0) for way in chosen])),
        "frechet": frechet_distance(_features(judge, [way.restored for way in chosen]), truth),
    }


def _features(judge, images):
    return judge_scores(judge, _pixels(images) / 255).features


def _pixels(images) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).movedim(-1, 1).float()
