"""A folder of images as training data, laid out as Hugging Face's `imagefolder`.

Images lie in the folder or below it. Captions come from `metadata.jsonl` or `metadata.csv` (`file_name`, `text`), else
classes from the names of sub-folders, else there are neither. `train/` and `validation/` sub-folders are the split
where they exist; otherwise 5 % of the images, chosen by a hash of their names, are held out.

Images are decoded once, upright, brought to the size and kept as raw pixels in the cache folder.
"""

import csv
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from studio.checks import first_line, shown, unrepeated
from studio.data.source import Examples, Source
from studio.errors import StudioError
from studio.files import cache_folder

HELD_OUT = 0.05
FEWEST = 8
SPLITS = ("train", "validation")
METADATA = ("metadata.jsonl", "metadata.csv")
CROPS = ("centre", "random", "none")
_AHEAD = 64


class ImageFolder(Source):
    """The images of a folder.

    Args:
        folder: where they lie.
        size: side in pixels; the short side of an image is resized to it, and a square is cropped.
        crop: which square: `"centre"`, `"random"`, or `"none"`, where the whole image is squeezed to a square.
        flip: whether training images are mirrored at random.

    Raises:
        StudioError: no such folder, fewer than `FEWEST` readable images, captions that do not fit to the files, or a
            cache that cannot be written.
    """

    train: "_Files"
    validation: "_Files"

    def __init__(self, folder: str | Path, size: int, *, crop: str = "centre", flip: bool = False):
        if crop not in CROPS:
            raise StudioError(f"--crop is one of {', '.join(CROPS)}, not {shown(crop)}.")
        self.folder, self.size, self.crop, self.flip = Path(folder).expanduser(), size, crop, flip
        if not self.folder.is_dir():
            raise StudioError(f"There is no folder {folder}: give --data a folder of images, or emoji.")
        files = every = _images_below(self.folder)
        if _has_splits(files):
            files = [file for file in files if Path(file).parts[0] in SPLITS]
        if not files:
            raise StudioError(f"{folder} holds no images (looked for {', '.join(sorted(_suffixes())[:6])}, ...).")
        captions = _captions(self.folder, files, every)
        classes = None if captions is not None else _classes(self.folder, files)
        self.has_captions = captions is not None
        self.class_names = None if classes is None else sorted(set(classes.values()))
        self.pixels = _Pixels(self.folder, files, size, crop)
        self.skipped = self.pixels.skipped
        readable = self.pixels.names
        if len(readable) < FEWEST:
            unread = f" ({len(self.skipped)} could not be read, first {self.skipped[0][0]})" if self.skipped else ""
            raise StudioError(f"{folder} holds {len(readable)} readable images{unread}; training needs {FEWEST}.")
        if classes is not None and self.class_names is not None:
            numbers = {name: number for number, name in enumerate(self.class_names)}
            classes = {name: numbers[of] for name, of in classes.items()}
        held_out = _held_out(readable)
        sides = [[i for i, name in enumerate(readable) if held_out[name] == side] for side in (False, True)]
        self._conditions = captions, classes
        self.train, self.validation = (_Files(self.pixels, side, captions, classes) for side in sides)
        self.unseen = self.validation
        self.name = self.folder.resolve().name
        known = [self.pixels.checksum, readable, sides, captions, classes]
        self.checksum = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        of_classes = f"images of {len(self.class_names)} classes" if self.class_names else "images"
        kinds = "captioned images" if captions else of_classes
        skipped = f", {len(self.skipped)} unreadable files left out" if self.skipped else ""
        self.description = (
            f"{self.name}: {len(self.train)} {kinds} to train, {len(self.validation)} to validate{skipped}"
            f"{_licence(self.folder)}"
        )

    def hold_out_everything(self) -> None:
        """Make every image a validation example, for a model that was not trained on this folder."""
        self.validation = self.unseen = _Files(self.pixels, range(len(self.pixels.names)), *self._conditions)

    def augmented(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        chosen = self.train.numbers[rng.integers(len(self.train), size=count)]
        offsets = rng.random(count) if self.crop == "random" else np.full(count, 0.5)
        images = torch.stack([self.pixels.square(number, offset) for number, offset in zip(chosen, offsets)])
        images = images.float() / 127.5 - 1
        if self.flip:
            mirrored = torch.from_numpy(rng.random(count) < 0.5)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images


class _Files(Examples):
    def __init__(self, pixels, numbers, captions, classes):
        self.pixels, self.numbers = pixels, np.array(numbers, dtype=np.int64)
        self._captions, self._classes = captions, classes

    def __len__(self):
        return len(self.numbers)

    def images(self, indices):
        squares = [self.pixels.square(number, 0.5) for number in self.numbers[np.asarray(indices)]]
        return torch.stack(squares).float() / 127.5 - 1

    def captions(self, indices, rng=None):
        if self._captions is None:
            return super().captions(indices, rng)
        wordings = [self._captions[self.pixels.names[number]] for number in self.numbers[np.asarray(indices)]]
        return [known[0] if rng is None else known[rng.integers(len(known))] for known in wordings]

    def labels(self, indices):
        if self._classes is None:
            return super().labels(indices)
        return torch.tensor([self._classes[self.pixels.names[number]] for number in self.numbers[np.asarray(indices)]])


class _Pixels:
    """Every readable image with its short side at `size`, as raw bytes in one file of the cache folder.

    Attributes:
        names: paths below the folder, in the order of the numbers.
        skipped: (path, reason) of files that could not be read.
        checksum: SHA-256 of the pixels.
    """

    def __init__(self, folder, files, size, crop):
        self.size = size
        listed = [(name, (stat := (folder / name).stat()).st_size, stat.st_mtime_ns) for name in files]
        key = hashlib.sha256(json.dumps([str(folder.resolve()), size, crop == "none", listed]).encode()).hexdigest()
        cached = cache_folder() / f"images-{key[:16]}"
        if not (cached / "index.json").is_file():
            _write_cache(cached, folder, files, size, crop == "none")
        index = json.loads((cached / "index.json").read_text(encoding="utf-8"))
        self.names, self.checksum = [entry[0] for entry in index["images"]], index["checksum"]
        self.skipped = [tuple(entry) for entry in index["skipped"]]
        self._places = [tuple(entry[1:]) for entry in index["images"]]
        self._bytes = np.memmap(cached / "pixels.bin", dtype=np.uint8, mode="r") if self.names else None

    def square(self, number: int, offset: float) -> torch.Tensor:
        """The square crop (3, size, size), uint8, at this fraction, in [0, 1], of the slack of the long side."""
        start, height, width = self._places[number]
        image = self._bytes[start : start + height * width * 3].reshape(height, width, 3)
        top, left = (int((side - self.size) * offset + 0.5) for side in (height, width))
        return torch.from_numpy(
            np.ascontiguousarray(image[top : top + self.size, left : left + self.size].transpose(2, 0, 1))
        )


def _write_cache(cached, folder, files, size, squeeze):
    """Writes `pixels.bin` and `index.json`, whole or not at all."""
    partial = cached.with_name(f"{cached.name}.{os.getpid()}.part")
    images, skipped, checksum, position = [], [], hashlib.sha256(), 0
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with open(partial / "pixels.bin", "wb") as stream, ThreadPoolExecutor() as pool:
            names = iter(files)
            waiting = [(name, pool.submit(_read, folder / name, size, squeeze)) for name in islice(names, _AHEAD)]
            with tqdm(total=len(files), desc="images", unit="image") as bar:
                while waiting:
                    name, future = waiting.pop(0)
                    if (following := next(names, None)) is not None:
                        waiting.append((following, pool.submit(_read, folder / following, size, squeeze)))
                    pixels = future.result()
                    bar.update()
                    if isinstance(pixels, str):
                        skipped.append((name, pixels))
                        continue
                    stream.write(pixels.tobytes())
                    checksum.update(pixels.tobytes())
                    images.append((name, position, *pixels.shape[:2]))
                    position += pixels.size
        index = {"images": images, "skipped": skipped, "checksum": checksum.hexdigest()}
        (partial / "index.json").write_text(json.dumps(index), encoding="utf-8")
        if not (cached / "index.json").is_file():  # another process may have been faster
            shutil.rmtree(cached, ignore_errors=True)
            partial.rename(cached)
    except OSError as error:
        raise StudioError(
            f"The images cannot be kept in {cached.parent} ({error.strerror or error}): free some space, or set "
            "STUDIO_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(path, size, squeeze):
    """Pixels (h, w, 3), uint8, with the short side at `size`; the reason as text for what cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * size, 2 * size))
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = _of_8_bits(image).convert("RGB")
            scale = size / min(image.size)
            shape = (size, size) if squeeze else tuple(max(size, round(side * scale)) for side in image.size)
            return np.asarray(image.resize(shape, Image.Resampling.LANCZOS))
    except Exception as error:  # Pillow's plugins raise errors of many kinds for damaged files
        return (str(error) or type(error).__name__).splitlines()[0][:200]


def _of_8_bits(image):
    """An image whose greys have 16 bits in 8 bits; `Image.convert` would make all but the darkest of them white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image


def _suffixes():
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _images_below(folder):
    """Paths of images below the folder, sorted, without hidden ones."""
    suffixes, found = _suffixes(), []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(parent).relative_to(folder)
        found += [
            (below / name).as_posix()
            for name in names
            if Path(name).suffix.lower() in suffixes and not name.startswith(".")
        ]
    return sorted(found)


def _captions(folder, files, every):
    """Captions by path, a list of wordings each; None where there is no metadata file.

    All of `files` need one, and every image that is named must be there.
    """
    known, found, there = {}, False, set(every)
    for below in ("", *SPLITS):
        for name in METADATA:
            file = folder / below / name
            if not file.is_file():
                continue
            found = True
            for path, text in _rows(file):
                known.setdefault((Path(below) / path).as_posix(), []).append(text)
    if not found:
        return None
    if missing := [path for path in known if path not in there]:
        raise StudioError(f"The captions name {len(missing)} images that are not in {folder}, first {missing[0]}.")
    if without := [path for path in files if path not in known]:
        raise StudioError(f"{len(without)} images in {folder} have no caption, first {without[0]}.")
    return known


def _rows(file):
    """(file_name, text) of every line of a metadata file."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            if file.suffix == ".csv":
                reader = csv.DictReader(stream)
                rows = [(reader.line_num, row) for row in reader]
            else:
                rows = [(number, _entry(line, number, file)) for number, line in enumerate(stream, 1) if line.strip()]
    except StudioError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise StudioError(f"{file} cannot be read ({str(error).splitlines()[0]}): mend or remove it.") from error
    for number, row in rows:
        pair = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not all(isinstance(value, str) and value.strip() for value in pair):
            raise StudioError(f"Line {number} of {file} needs file_name and text, both non-empty texts.")
        yield pair


def _entry(line, number, file):
    """The JSON value of a line of a metadata file."""
    try:
        return json.loads(line, object_pairs_hook=unrepeated)
    except StudioError as error:
        raise StudioError(f"Line {number} of {file}: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or first_line(error)
        raise StudioError(f"Line {number} of {file} cannot be read ({reason}): mend or remove it.") from error


def _classes(folder, files):
    """The class of every path, its innermost sub-folder; None unless every image lies in one."""
    classes = {}
    for path in files:
        parts = Path(path).parts[:-1]
        parts = parts[1:] if parts and parts[0] in SPLITS and _has_splits(files) else parts
        classes[path] = parts[-1] if parts else None
    return classes if all(classes.values()) else None


def _has_splits(files):
    return {Path(path).parts[0] for path in files} >= set(SPLITS)


def _held_out(files):
    """Which files are for validation: the `validation/` folder's, or some by a hash of the name; one at least."""
    if _has_splits(files):
        return {path: Path(path).parts[0] == "validation" for path in files}
    share = {path: int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64 for path in files}
    least = min(share, key=share.get)
    return {path: value < HELD_OUT or path == least for path, value in share.items()}


def _licence(folder):
    """The licence that the data states, for the card."""
    for name in ("LICENSE", "LICENSE.txt", "LICENCE", "LICENCE.txt"):
        if (folder / name).is_file():
            first = (folder / name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return f"; licence: {first[0].strip()[:100]}" if first else ""
    return "; licence: not stated"
