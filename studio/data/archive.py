"""Reader of the bundled Fluent Emoji archive: concepts with labels and tags, and their images in two styles."""

import io
import json
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from studio.errors import StudioError

ARCHIVE = Path(__file__).with_name("fluent-emoji.zip")
RESOLUTION = 128
STYLES = ("3d", "flat")


@dataclass(frozen=True)
class Concept:
    """One emoji: `index` in the archive, `label` ("red apple"), search `tags`, Unicode `group`, the character."""

    index: int
    label: str
    tags: tuple[str, ...]
    group: str
    emoji: str


@lru_cache(maxsize=4)
def load_concepts(archive: Path = ARCHIVE) -> tuple[Concept, ...]:
    """All concepts, in the archive's order."""
    with _open(archive) as file:
        entries = json.loads(file.read("concepts.json"))
    return tuple(
        Concept(index, entry["label"], tuple(entry["tags"]), entry["group"], entry["emoji"])
        for index, entry in enumerate(entries)
    )


@lru_cache(maxsize=4)
def load_images(resolution: int = RESOLUTION, archive: Path = ARCHIVE) -> np.ndarray:
    """Every image as premultiplied RGBA.

    Args:
        resolution: side in pixels, at most 128.
        archive: the `.zip` written by `studio data build`.

    Returns:
        Array `(concepts, styles, resolution, resolution, 4)`, uint8, colour already multiplied by alpha, so that
        composition over a background is `rgb + (1 - alpha) * background`. Read-only; shared between callers.
    """
    if not 1 <= resolution <= RESOLUTION:
        raise StudioError(f"The archive holds images up to {RESOLUTION} px; {resolution} is out of range.")
    concepts = load_concepts(archive)
    images = np.empty((len(concepts), len(STYLES), resolution, resolution, 4), dtype=np.uint8)
    with _open(archive) as file:
        for concept in concepts:
            for style_index, style in enumerate(STYLES):
                image = Image.open(io.BytesIO(file.read(f"{style}/{concept.index:04d}.webp"))).convert("RGBa")
                if resolution != RESOLUTION:
                    image = image.resize((resolution, resolution), Image.Resampling.BOX)
                images[concept.index, style_index] = np.asarray(image)
    images.flags.writeable = False
    return images


def _open(archive):
    try:
        return zipfile.ZipFile(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise StudioError(f"{archive} is not a readable emoji archive; build it with `studio data build`.") from error
