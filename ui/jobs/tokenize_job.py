"""An image turned into tokens and back, and what JPEG and WebP keep of it in as many bytes."""

import dataclasses
import math
import time
from pathlib import Path

from studio.errors import StudioError
from studio.ui.jobs.stopping import stoppable
from studio.ui.jobs.tiling import restored_tiles
from studio.ui.render.length_control import Scale
from studio.ui.render.sizes import readable, resized
from studio.ui.server.checks import check_flag
from studio.ui.server.limits import check_model, limits
from studio.ui.server.models import bundled_models, get_tokenizer, tokenizer_scale
from studio.ui.server.worker import follow
from studio.ui.server.zerogpu import on_gpu

CODECS = {"webp": "WebP", "jpeg": "JPEG"}
_MOST_BYTES = 1 << 26  # of an .odp file that is read


@dataclasses.dataclass(frozen=True)
class TokenizeRequest:
    """One image and how to restore it.

    Args:
        tokenizer: what `studio.load` takes.
        image: path of the file.
        count: the length or the depth to restore it from; all there is where it is `None`.
        tile: whether to cut it into the tokenizer's squares, each of that length, instead of resizing it to one.
    """

    tokenizer: str | None
    image: str | None
    count: int | None = None
    tile: bool = False

    def __post_init__(self):
        object.__setattr__(self, "tokenizer", _name(self.tokenizer))
        check_flag("Whether to cut tiles", self.tile)
        if not self.tokenizer:
            raise StudioError("Choose a tokenizer: a bundled one such as emoji-vq, or a folder of one.")
        if not self.image:
            raise StudioError("Give an image first: drop a file on the field, or take an example.")


@dataclasses.dataclass(frozen=True)
class DetokenizeRequest:
    """An `.odp` file to restore: its path, and the tokenizer it was made with, where it names no bundled one."""

    tokenizer: str | None
    file: str | None

    def __post_init__(self):
        object.__setattr__(self, "tokenizer", _name(self.tokenizer))
        if not self.file:
            raise StudioError("Give an .odp file first, one that this tab or `studio tokenize` made.")


def _name(tokenizer):
    """The name of a tokenizer in a request, empty for none."""
    return check_model(tokenizer).strip() if tokenizer not in (None, "") else ""


@dataclasses.dataclass(frozen=True)
class Rival:
    """What another codec makes of the image: the best in so many bytes, or `None`, and the bytes of its least file.

    `best` has the attributes of `studio.bench.rate_distortion.Encoded`.
    """

    codec: str
    best: object
    least: int


@dataclasses.dataclass(frozen=True)
class Restoration:
    """Where the work on an image stands; all but `original` is there when it was restored, in one step.

    Args:
        original: the image, at a size to be looked at; `None` while it is read.
        size: its own width and height in pixels.
        decoded: what was restored, a PIL image of the tokenizer's size, or of its own where it was cut into tiles.
        side: the tokenizer's size.
        tiles: how many squares of that size it was cut into, or `None` where it was resized to one.
        planes: see `studio.ui.render.token_planes`.
        scale, count: what it was restored from, of how many; `None` where tokens are always all used.
        tokens, bits: of what it was restored from; no bits where tokens are continuous.
        file: the bytes of the `.odp` file, where there is that format.
        psnr: in dB, over what was restored.
        seconds: to encode and to decode.
        rivals: as far as they have been tried.
    """

    original: object = None
    size: tuple[int, int] | None = None
    decoded: object = None
    side: int = 0
    tiles: int | None = None
    planes: list = ()
    scale: Scale | None = None
    count: int | None = None
    tokens: int = 0
    bits: float | None = None
    file: bytes | None = None
    psnr: float = 0.0
    seconds: dict = dataclasses.field(default_factory=dict)
    rivals: tuple[Rival, ...] = ()

    @property
    def restored(self):
        """What was restored, as large as `original`."""
        return resized(self.decoded, self.original.size)

    @property
    def payload(self):
        """Bytes of the packed token numbers alone; `None` where tokens are continuous."""
        return None if self.bits is None else math.ceil(self.bits / 8)

    @property
    def bytes(self):
        """Bytes of the file, or of the token numbers where there is no file format."""
        return self.payload if self.file is None else len(self.file)

    @property
    def counted(self):
        """What is counted of every codec, an entry of `studio.bench.rate_distortion.COUNTED`."""
        return "without fixed parts" if self.file is None else "file"


@dataclasses.dataclass(frozen=True)
class Opened:
    """What an `.odp` file holds: the image at its own size, the tokenizer, and the numbers of tokens and bytes.

    The image is `None` while the model is being loaded.
    """

    image: object = None
    tokenizer: str = ""
    tokens: int = 0
    bytes: int = 0


def restore(wish):
    """Follow a `TokenizeRequest`: an asynchronous iterator over `Restoration`, the last one with all rivals.

    Raises:
        StudioError: the image or the tokenizer cannot be read, there is no such length or depth, or no tiles can be
            cut.
    """
    return follow(lambda job: _restore(wish, job))


def open_file(wish):
    """Follow a `DetokenizeRequest`: an asynchronous iterator over `Opened`.

    Raises:
        StudioError: the file is none that a tokenizer here can read.
    """
    return follow(lambda job: _open(wish, job))


@on_gpu(seconds=60)
def _restore(wish, job):
    from studio.images import open_image

    image = open_image(wish.image, Path(wish.image).name, limits().pixels)
    found = Restoration(readable(image), image.size)
    job.report(found)
    tokenizer = get_tokenizer(wish.tokenizer, job.device)
    given = image if wish.tile else _square(image, tokenizer.config.sample_size)
    with stoppable(tokenizer, job):
        if wish.tile:
            found = _with_tiles(found, wish, tokenizer, image)
        else:
            found = _restored(found, wish, tokenizer, given)
            if is_row(tokenizer):
                found = dataclasses.replace(found, file=_odp_of(image, tokenizer, found.count, wish.tokenizer))
    job.report(found)
    for codec in CODECS if found.bytes is not None else ():
        if not job.stopped:
            found = dataclasses.replace(found, rivals=(*found.rivals, _rival(codec, given, found)))
            job.report(found)
    return found


def _restored(found, wish, tokenizer, square):
    import torch

    from studio.bench.tokenizers import size_of
    from studio.evaluation.metrics import psnr
    from studio.ui.render.token_planes import token_planes

    scale = tokenizer_scale(wish.tokenizer)
    if scale is None and wish.count is not None:
        raise StudioError(f"{wish.tokenizer} restores from all of its tokens: leave the length or depth empty.")
    how = scale.settings(wish.count) if scale else {}
    pixels = _pixels(square)
    with torch.inference_mode():
        began = time.perf_counter()
        tokens = tokenizer.encode((pixels * 2 - 1).to(tokenizer.device, tokenizer.dtype))
        encoded = time.perf_counter()
        restored = (tokenizer.decode(tokens, **how).float().cpu() / 2 + 0.5).clamp(0, 1).mul(255).round()
        decoded = time.perf_counter()
    return dataclasses.replace(
        found,
        decoded=_image(restored[0]),
        side=square.width,
        planes=token_planes(tokenizer, tokens, how),
        scale=scale,
        count=how.get(scale.name) if scale else None,
        psnr=float(psnr(restored / 255, pixels)[0]),
        seconds={"encode": encoded - began, "decode": decoded - encoded},
        **size_of(tokenizer, tokens.cpu(), how),
    )


def is_row(tokenizer):
    """Whether images of a tokenizer can be kept in `.odp` files."""
    from studio import OneDPieceTokenizer

    return isinstance(tokenizer, OneDPieceTokenizer)


def _with_tiles(found, wish, tokenizer, image):
    if not is_row(tokenizer):
        raise StudioError(
            f"{wish.tokenizer} cannot cut images into tiles: choose a One-D-Piece tokenizer, or leave out the tiles."
        )
    scale = tokenizer_scale(wish.tokenizer)
    count = scale.settings(wish.count)[scale.name]
    tiles = restored_tiles(image, tokenizer, count, _name_in_files(wish.tokenizer))
    return dataclasses.replace(found, side=tokenizer.config.sample_size, scale=scale, count=count, **tiles)


def _odp_of(image, tokenizer, length, name):
    from studio import encode_image

    return encode_image(image, tokenizer, length=length, name=_name_in_files(name)).data


def _name_in_files(name):
    """What an `.odp` file calls a tokenizer: by its name where it is bundled, else not at all."""
    return name if name in bundled_models("tokenizer") else ""


def _rival(codec, given, found):
    from studio.bench.rate_distortion import best, ways

    encoded = ways(given, codec)
    return Rival(codec, best(encoded, found.bytes, found.counted), min(way.size for way in encoded))


@on_gpu(seconds=60)
def _open(wish, job):
    from studio import OdpFile, decode_image
    from studio.images import check_pixels

    name = Path(wish.file).name
    data = _read(wish.file, name)
    content = OdpFile.from_bytes(data, name)
    check_pixels(name, content.width, content.height, limits().pixels)
    job.report(Opened())
    chosen = content.tokenizer if content.tokenizer in bundled_models("tokenizer") else wish.tokenizer
    if not chosen:
        raise StudioError(f"{name} names no bundled tokenizer: choose the One-D-Piece tokenizer that it was made with.")
    tokenizer = get_tokenizer(chosen, job.device)
    if not is_row(tokenizer):
        raise StudioError(
            f"{name} was made with a One-D-Piece tokenizer: choose the one it was made with, not {chosen}."
        )
    with stoppable(tokenizer, job):
        image = decode_image(content, tokenizer, name)
    return Opened(image, chosen, len(content.tokens), len(data))


def _read(path, name):
    """The bytes of a file, of a very long one the first: it is no .odp file, and would fill the memory."""
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise StudioError(f"{name} cannot be read: {error.strerror or error}.") from error


def _square(image, side):
    """The whole image as the tokenizer reads it."""
    from PIL import Image

    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)


def _pixels(square):
    """(1, 3, side, side) in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(square).copy()).movedim(-1, 0)[None].float() / 255


def _image(levels):
    """A PIL image of whole levels (3, side, side) from 0 to 255."""
    import torch
    from PIL import Image

    return Image.fromarray(levels.to(torch.uint8).movedim(0, -1).numpy())
