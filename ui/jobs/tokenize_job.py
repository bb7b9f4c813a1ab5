"""The work behind the Tokenize tab: an image to tokens and back, beside JPEG and WebP of as many bytes."""

import dataclasses
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.checks import check_flag
from studio.errors import StudioError
from studio.ui.jobs.stopping import stoppable
from studio.ui.jobs.tiling import restored_tiles
from studio.ui.render.length_control import LengthControl
from studio.ui.render.sizes import readable, resized
from studio.ui.server.limits import check_model, limits
from studio.ui.server.models import bundled_models, get_tokenizer, tokenizer_length_control
from studio.ui.server.worker import Job, follow
from studio.ui.server.zerogpu import on_gpu

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from studio import OneDPieceTokenizer
    from studio.bench.rate_distortion import Encoded
    from studio.ui.render.token_planes import TokenPlane

CODECS = {"webp": "WebP", "jpeg": "JPEG"}
_MOST_BYTES = 1 << 26  # of an .odp file that is read


@dataclasses.dataclass(frozen=True)
class TokenizeRequest:
    """An image and how to restore it.

    Args:
        tokenizer: what `studio.load` takes.
        image: the path of its file.
        count: the length or the depth to restore it from, at least 1; `None` for all tokens.
        tile: whether to cut it into tiles, each of that length, instead of resizing it to one square.
    """

    tokenizer: str
    image: str
    count: int | None = None
    tile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", _name(self.tokenizer))
        check_flag("Whether to cut tiles", self.tile)
        if not self.tokenizer:
            raise StudioError("Choose a tokenizer: a bundled one such as emoji-vq, or a folder of one.")
        if not self.image:
            raise StudioError("Give an image first: drop a file on the field, or take an example.")


@dataclasses.dataclass(frozen=True)
class DetokenizeRequest:
    """An `.odp` file to decode: its path, and its tokenizer where the file names no bundled one."""

    tokenizer: str
    file: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", _name(self.tokenizer))
        if not self.file:
            raise StudioError("Give an .odp file first, one that this tab or `studio tokenize` made.")


def _name(tokenizer: object) -> str:
    """The name of a tokenizer in a request; empty for none."""
    return check_model(tokenizer).strip() if tokenizer not in (None, "") else ""


@dataclasses.dataclass(frozen=True)
class Rival:
    """Another codec: its best encoding in as many bytes, `None` where there is none, and its smallest file in bytes."""

    codec: str
    best: "Encoded | None"
    smallest: int


@dataclasses.dataclass(frozen=True)
class Restoration:
    """The state of a `TokenizeRequest`; all but `original` and `size` is set once the image is restored.

    Args:
        original: the image, at a readable size; `None` while it is read.
        size: its own width and height in pixels.
        decoded: the restored image, of the tokenizer's size, or of the image's own where it was cut into tiles.
        side: the tokenizer's size in pixels.
        tiles: the number of tiles, or `None` where the image was resized to one square.
        planes: see `studio.ui.render.token_planes`.
        control, count: the length or depth it was restored from; `None` where all tokens are always used.
        tokens, bits: of what it was restored from; no bits where tokens are continuous.
        file: the bytes of the `.odp` file, where there is that format.
        psnr: in dB, of the restored image.
        seconds: by phase, "encode" and "decode".
        rivals: the other codecs tried so far.
    """

    original: "Image | None" = None
    size: tuple[int, int] = (0, 0)
    decoded: "Image | None" = None
    side: int = 0
    tiles: int | None = None
    planes: "list[TokenPlane]" = dataclasses.field(default_factory=list)
    control: LengthControl | None = None
    count: int | None = None
    tokens: int = 0
    bits: float | None = None
    file: bytes | None = None
    psnr: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    rivals: tuple[Rival, ...] = ()

    @property
    def restored(self) -> "Image":
        """The restored image, as large as `original`."""
        assert self.decoded is not None and self.original is not None
        return resized(self.decoded, self.original.size)

    @property
    def payload(self) -> int | None:
        """Bytes of the packed token numbers alone; `None` where tokens are continuous."""
        return None if self.bits is None else math.ceil(self.bits / 8)

    @property
    def bytes(self) -> int | None:
        """Bytes of the file, or of the token numbers where there is no file format."""
        return self.payload if self.file is None else len(self.file)

    @property
    def counted(self) -> str:
        """Which bytes of each codec count, an entry of `studio.bench.rate_distortion.COUNTED`."""
        return "without fixed parts" if self.file is None else "file"


@dataclasses.dataclass(frozen=True)
class Opened:
    """The content of an `.odp` file: the image at its own size, the tokenizer, and the numbers of tokens and bytes.

    The image is `None` while the model is being loaded.
    """

    image: "Image | None" = None
    tokenizer: str = ""
    tokens: int = 0
    bytes: int = 0


def restore(request: TokenizeRequest) -> AsyncIterator[Restoration]:
    """Follow a request.

    Yields:
        The state so far; the last one has all codecs.

    Raises:
        StudioError: the image or the tokenizer cannot be read, there is no such length or depth, or the tokenizer takes
            no tiles.
    """
    return follow(lambda job: _restore(request, job))


def open_file(request: DetokenizeRequest) -> AsyncIterator[Opened]:
    """Follow a request.

    Yields:
        An `Opened` without an image, then the one with it.

    Raises:
        StudioError: no tokenizer here can read the file.
    """
    return follow(lambda job: _open(request, job))


@on_gpu(seconds=60)
def _restore(request: TokenizeRequest, job: Job) -> Restoration:
    from studio.images import open_image

    image = open_image(request.image, Path(request.image).name, limits().pixels)
    found = Restoration(readable(image), image.size)
    job.report(found)
    tokenizer = get_tokenizer(request.tokenizer, job.device)
    given = image if request.tile else _square(image, tokenizer.config.sample_size)
    if request.tile:
        found = _with_tiles(found, request, tokenizer, image, job)
    else:
        with stoppable(tokenizer, lambda: job.stopped):
            found = _restored(found, request, tokenizer, given)
        if is_row(tokenizer):
            found = dataclasses.replace(found, file=_odp_file(image, tokenizer, found.count, request.tokenizer, job))
    job.report(found)
    for codec in CODECS if found.bytes is not None else ():
        if not job.stopped:
            found = dataclasses.replace(found, rivals=(*found.rivals, _rival(codec, given, found)))
            job.report(found)
    return found


def _restored(found: Restoration, request: TokenizeRequest, tokenizer: Any, square: "Image") -> Restoration:
    import torch

    from studio.bench.tokenizers import size_of
    from studio.evaluation.metrics import psnr
    from studio.ui.render.token_planes import token_planes

    control = tokenizer_length_control(request.tokenizer)
    if control is None and request.count is not None:
        raise StudioError(f"{request.tokenizer} restores from all of its tokens: leave the length or depth empty.")
    how = control.settings(request.count) if control else {}
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
        control=control,
        count=how.get(control.name) if control else None,
        psnr=float(psnr(restored / 255, pixels)[0]),
        seconds={"encode": encoded - began, "decode": decoded - encoded},
        **size_of(tokenizer, tokens.cpu(), how),
    )


def is_row(tokenizer: object) -> bool:
    """Whether images of a tokenizer can be saved as `.odp` files."""
    from studio import OneDPieceTokenizer

    return isinstance(tokenizer, OneDPieceTokenizer)


def _with_tiles(found: Restoration, request: TokenizeRequest, tokenizer: Any, image: "Image", job: Job) -> Restoration:
    control = tokenizer_length_control(request.tokenizer)
    if not is_row(tokenizer) or control is None:
        raise StudioError(
            f"{request.tokenizer} cannot cut images into tiles: choose a One-D-Piece tokenizer, or leave out the tiles."
        )
    count = control.settings(request.count)[control.name]
    tiles = restored_tiles(image, tokenizer, count, _name_in_files(request.tokenizer), lambda: job.stopped)
    return dataclasses.replace(found, side=tokenizer.config.sample_size, control=control, count=count, **tiles)


def _odp_file(image: "Image", tokenizer: "OneDPieceTokenizer", length: int | None, name: str, job: Job) -> bytes:
    from studio import encode_image

    name = _name_in_files(name)
    return encode_image(image, tokenizer, length=length, name=name, stopped=lambda: job.stopped).data


def _name_in_files(name: str) -> str:
    """The name of a tokenizer in an `.odp` file: empty unless it is bundled."""
    return name if name in bundled_models("tokenizer") else ""


def _rival(codec: str, given: "Image", found: Restoration) -> Rival:
    from studio.bench.rate_distortion import best, ways

    assert found.bytes is not None
    encoded = ways(given, codec)
    return Rival(codec, best(encoded, found.bytes, found.counted), min(way.size for way in encoded))


@on_gpu(seconds=60)
def _open(request: DetokenizeRequest, job: Job) -> Opened:
    from studio import OdpFile, decode_image
    from studio.images import check_pixels

    name = Path(request.file).name
    data = _read(request.file, name)
    content = OdpFile.from_bytes(data, name)
    check_pixels(name, content.width, content.height, limits().pixels)
    job.report(Opened())
    chosen = content.tokenizer if content.tokenizer in bundled_models("tokenizer") else request.tokenizer
    if not chosen:
        raise StudioError(f"{name} names no bundled tokenizer: choose the One-D-Piece tokenizer that it was made with.")
    tokenizer = get_tokenizer(chosen, job.device)
    if not is_row(tokenizer):
        raise StudioError(
            f"{name} was made with a One-D-Piece tokenizer: choose the one it was made with, not {chosen}."
        )
    image = decode_image(content, tokenizer, name, stopped=lambda: job.stopped)
    return Opened(image, chosen, len(content.tokens), len(data))


def _read(path: str, name: str) -> bytes:
    """The bytes of a file; only the first ones of a file so long that it cannot be an .odp file."""
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise StudioError(f"{name} cannot be read: {error.strerror or error}.") from error


def _square(image: "Image", side: int) -> "Image":
    """The image resized to the tokenizer's size."""
    from PIL import Image

    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)


def _pixels(square: "Image") -> "torch.Tensor":
    """(1, 3, side, side) in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(square).copy()).movedim(-1, 0)[None].float() / 255


def _image(levels: "torch.Tensor") -> "Image":
    """A PIL image of integer levels (3, side, side) from 0 to 255."""
    import torch
    from PIL import Image

    return Image.fromarray(levels.to(torch.uint8).movedim(0, -1).numpy())
