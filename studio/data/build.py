"""Builds the Fluent Emoji archive from three npm packages (`studio data build`).

Sources, all MIT: `@lobehub/fluent-emoji-3d` (256 px webp), `fluentui-emoji` (flat SVG, rasterised here with
resvg) and `emojibase-data` (labels, tags, groups). Needs `npm` and the `data` extra; nothing else in the
library does, because the archive is shipped.
"""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from studio.data.archive import RESOLUTION, STYLES
from studio.errors import StudioError

PACKAGES = {
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "flat": ("fluentui-emoji", "1.3.0"),
    "labels": ("emojibase-data", "17.0.0"),
}
WEBP_QUALITY = 90
DUPLICATE_RMSE = 0.035
"""Two concepts are one image if, over grey at 32 px, both styles differ by less than this (values in [0, 1])."""

_SPELLINGS = {"’": "", "'": "", "“": "", "”": "", ".": "", "!": "", "&": "and"}
_GENDERED = re.compile(r"^(man|woman|men|women|old man|old woman)\b[: ]*")
_VARIANT = re.compile(r"facing right|^family: |^kiss: |^couple with heart: |skin tone|^(man|woman|person): ")


def build_archive(out: str | Path, source: str | Path | None = None) -> int:
    """Write the archive of every concept that has both styles.

    Args:
        out: path of the `.zip` to write.
        source: folder that already holds the three packages as `npm pack` writes them; fetched when `None`.

    Returns:
        The number of concepts written.

    Raises:
        StudioError: `npm` or the rasteriser is missing, or a package cannot be fetched.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise StudioError("Rasterising the flat style needs resvg: pip install 'resvg-py==0.5.0'.") from error

    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            key: _unpack(name, version, source, Path(scratch) / key) for key, (name, version) in PACKAGES.items()
        }
        groups = json.loads((folders["labels"] / "meta/groups.json").read_text())["groups"]
        entries = json.loads((folders["labels"] / "en/data.json").read_text())
        concepts, images = [], []
        for entry in _neutral(entries):
            flat = _flat_file(folders["flat"], entry["label"])
            solid = _solid_file(folders["3d"], entry["hexcode"])
            if flat is None or solid is None:
                continue
            svg = resvg_py.svg_to_bytes(svg_path=str(flat), width=RESOLUTION * 2, height=RESOLUTION * 2)
            both = {"3d": _square(Image.open(solid)), "flat": _square(Image.open(io.BytesIO(bytes(svg))))}
            concepts.append(
                {
                    "label": entry["label"].lower().replace("“", "").replace("”", "").replace("’", "'"),
                    "tags": [tag.lower() for tag in entry.get("tags", [])],
                    "group": groups[str(entry["group"])],
                    "emoji": entry["emoji"],
                }
            )
            images.append(both)
        kept = _without_duplicates(images)
        _write(Path(out), [concepts[i] for i in kept], [images[i] for i in kept], folders)
    return len(kept)


def _unpack(name, version, source, into):
    wanted = f"{name.replace('@', '').replace('/', '-')}-{version}.tgz"
    if source is None:
        if shutil.which("npm") is None:
            raise StudioError(
                "Building the data needs npm; install Node.js, or pass --source with the packed packages."
            )
        into.mkdir(parents=True)
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        if subprocess.run(command, cwd=into, stdout=subprocess.DEVNULL, check=False).returncode:
            raise StudioError(f"npm could not fetch {name}@{version}; check the network and try again.")
        source = into
    file = Path(source) / wanted
    if not file.is_file():
        raise StudioError(f"{source} has no {wanted}; run `npm pack {name}@{version}` there.")
    with tarfile.open(file) as archive:
        archive.extractall(into, filter="data")
    return into / "package"


def _neutral(entries):
    """Entries without skin tones, gendered twins, mirrored copies, or families spelled out member by member."""
    entries = sorted((entry for entry in entries if "group" in entry), key=lambda entry: entry["order"])
    labels = {entry["label"] for entry in entries}
    for entry in entries:
        label = entry["label"]
        rest = _GENDERED.sub("", label)
        twins = {
            rest,
            f"person {rest}",
            f"people {rest}",
            f"person: {rest}",
            "older person" if label.startswith("old ") else "",
        }
        if not _VARIANT.search(label) and not (rest != label and twins & labels) and entry["group"] != 2:
            yield entry


def _flat_file(folder, label):
    slug = label.lower()
    for mark, plain in _SPELLINGS.items():
        slug = slug.replace(mark, plain)
    slug = re.sub(r"[^\w]+", "-", slug).strip("-")
    candidates = [folder / "icons/flat" / f"{slug}{ending}.svg" for ending in ("", "-default")]
    return next((file for file in candidates if file.is_file()), None)


def _solid_file(folder, hexcode):
    code = hexcode.lower()
    candidates = [folder / "assets" / f"{name}.webp" for name in (code, code.replace("-fe0f", ""), f"{code}-fe0f")]
    return next((file for file in candidates if file.is_file()), None)


def _square(image):
    """RGBA at the archive's resolution, averaged with the alpha multiplied in so that edges stay clean."""
    rgba = image.convert("RGBA")
    premultiplied = rgba.convert("RGBa").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    return premultiplied.convert("RGBA")


def _without_duplicates(images):
    small = {}
    for style in STYLES:
        stack = []
        for both in images:
            rgba = np.asarray(both[style].resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / 255
            stack.append((rgba[..., :3] * rgba[..., 3:] + 0.5 * (1 - rgba[..., 3:])).ravel())
        small[style] = np.stack(stack)
    kept = []
    for i in range(len(images)):
        distance = np.zeros(len(kept))
        for style in STYLES:
            difference = small[style][kept] - small[style][i]
            distance = np.maximum(distance, np.sqrt((difference**2).mean(axis=1)))
        if not (distance < DUPLICATE_RMSE).any():
            kept.append(i)
    return kept


def _write(out, concepts, images, folders):
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    stamp = (2020, 1, 1, 0, 0, 0)
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:

        def add(name, content):
            archive.writestr(zipfile.ZipInfo(name, stamp), content)

        add("concepts.json", json.dumps(concepts, ensure_ascii=False, indent=0))
        for key, (name, version) in PACKAGES.items():
            licence = next((file for file in folders[key].glob("LICENSE*")), folders[key] / "package.json")
            add(f"licences/{name.replace('/', '-')}-{version}.txt", licence.read_bytes())
        for index, both in enumerate(images):
            for style in STYLES:
                buffer = io.BytesIO()
                both[style].save(buffer, "WEBP", quality=WEBP_QUALITY, alpha_quality=100, method=6)
                add(f"{style}/{index:04d}.webp", buffer.getvalue())
    partial.replace(out)
