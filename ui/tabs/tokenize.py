"""The Tokenize tab: an image to tokens and back, beside JPEG and WebP of as many bytes."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from studio.checkpoints.bundled import DEFAULT_TOKENIZER
from studio.ui.jobs.tokenize_job import (
    CODECS,
    DetokenizeRequest,
    Opened,
    Restoration,
    Rival,
    TokenizeRequest,
    open_file,
    restore,
)
from studio.ui.render.codecs import codec_caption, comparison_note, counted_bytes
from studio.ui.render.length_control import LengthControl
from studio.ui.render.sizes import readable, resized
from studio.ui.render.token_grid import code_grids
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.models import bundled_models, tokenizer_length_control
from studio.ui.tabs.actions import FAILED, ON_THE_MODEL, PRIVATE, connect_actions
from studio.ui.tabs.components import duration, image_grid, named_png, short_name, status_line, uploaded
from studio.ui.tabs.examples import example

OUTPUTS = ("pair", "opened", "codecs", "codes", "count", "download", "status")
EXAMPLES = ("scene-melon.png", "scene-ewes.png")
IDLE = status_line("Give an image, and see it after encoding to tokens and decoding.")
LOADING = status_line("Loading the tokenizer …", state="running", fraction=0)
_CONTROLS = {
    "length": ("Length", "How many of the first tokens to decode."),
    "depth": ("Depth", "How many levels of codes to decode, coarse to fine."),
}


def build_tab() -> tuple[gr.Image, gr.Button, gr.ImageSlider]:
    """Build the tab inside the current Blocks; the tokenizer is loaded by the first image.

    Returns:
        The field of the image, the button that sends the restored one to be edited, and the pair that holds it.
    """
    names = bundled_models("tokenizer")
    first = DEFAULT_TOKENIZER if DEFAULT_TOKENIZER in names else next(iter(names), None)
    with gr.Row(elem_id="studio-tokenize", elem_classes="studio-stage"):
        with gr.Column(elem_classes="area-ask"):
            image = gr.Image(label="Image", sources=["upload", "clipboard"], height=240, elem_id="original")
            with gr.Row(elem_classes="studio-actions"):
                start = gr.Button("Tokenize", variant="primary", elem_id="tokenize", scale=2)
                cancel = gr.Button("Cancel", variant="stop", elem_id="tokenize-cancel", visible=False, scale=2)
            examples = gr.Dataset(
                components=[image],
                samples=[[example(file)] for file in EXAMPLES],
                label="Try",
                elem_id="tokenize-examples",
                type="index",
            )
        with gr.Column(elem_classes="area-show"):
            pair = gr.ImageSlider(
                label="Original and restored",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="pair",
            )
            opened = gr.Image(
                label="From the file",
                format="png",
                interactive=False,
                visible=False,
                buttons=["download", "fullscreen"],
                elem_id="opened",
            )
            status = gr.HTML(IDLE, elem_id="tokenize-status", elem_classes="studio-line")
            with gr.Row(elem_classes="studio-send-to"):
                edit = gr.Button("Edit the restored image", elem_id="restored-to-edit", size="sm")
            codecs = image_grid(
                label="The same bytes", show_label=False, columns=3, visible=False, elem_id="codecs", captioned=True
            )
            codes = gr.HTML("", elem_id="codes", elem_classes="studio-line")
        with gr.Column(elem_classes="area-tune"):
            tokenizer = gr.Dropdown(
                names,
                value=first,
                label="Tokenizer",
                info="A bundled tokenizer, a folder or a Hugging Face id; of a pipeline, its tokenizer.",
                allow_custom_value=True,
                elem_id="tokenizer",
            )
            settings = {"maximum": 2} | _control_settings(tokenizer_length_control(first or ""))
            count = gr.Slider(minimum=1, step=1, elem_id="scale", buttons=[], **settings)
            tile = gr.Checkbox(
                False,
                label="Tiles",
                info="Encode the image at its own size, in tiles of this length each (One-D-Piece only).",
                elem_id="tile",
            )
            with gr.Row(elem_classes="studio-files"):
                download = gr.DownloadButton("Download .odp", visible=False, elem_id="download-odp", size="md")
                upload = gr.UploadButton(
                    "Open an .odp file", file_types=[".odp"], elem_id="open-odp", size="md", scale=1
                )

    shown = [pair, opened, codecs, codes, count, download, status]
    connect_actions(
        [
            ([start.click, count.release], show_restoring, [tokenizer, image, count, tile], shown),
            ([upload.upload], show_opening, [tokenizer, upload], shown),
        ],
        status,
        starts=[start],
        cancel=cancel,
    )
    examples.click(lambda number: example(EXAMPLES[number]), examples, image, queue=False, **PRIVATE)
    tokenizer.change(
        lambda name: gr.update(**_control_settings(tokenizer_length_control((name or "").strip()))),
        tokenizer,
        count,
        queue=False,
        **PRIVATE,
    )
    _endpoints(image)
    return image, edit, pair


def _control_settings(control: LengthControl | None) -> dict[str, Any]:
    if control is None:
        return {"visible": False}
    label, info = _CONTROLS[control.name]
    return {"visible": True, "maximum": control.most, "value": control.most, "label": label, "info": info}


def _endpoints(image: gr.Image) -> None:
    """The endpoints for programs."""

    async def tokenize(image, tokenizer, count=None, tile=False):
        """Encode an image to tokens and decode it; streams the restored image, then JPEG and WebP for comparison.

        Args:
            image: an image file of any size; a tool is given its data (data:image/png;base64,... text), no link.
            tokenizer: a bundled one such as "emoji-vq", a folder or a Hugging Face id; of a pipeline, its tokenizer.
            count: the length in tokens or the depth in levels to decode; all when empty.
            tile: encode tiles of the tokenizer's size instead of one resized square; One-D-Piece only.

        Returns:
            The restored image as a PNG file of its own size; an .odp file where the tokenizer is a One-D-Piece, else
            nothing; and details: tokens, bits, bytes, PSNR and seconds, and those of JPEG and WebP in as many bytes.
        """
        async for update in answer_restoring(image, tokenizer, count, tile):
            yield update

    async def detokenize(file, tokenizer=None):
        """Restore the image of an .odp file.

        Args:
            file: an .odp file; a tool is given its data (data:application/octet-stream;base64,... text), no link.
            tokenizer: the One-D-Piece tokenizer that it was made with, where the file names no bundled one.

        Returns:
            The image as a PNG file, and details: tokenizer, tokens, bytes, width and height.
        """
        async for update in answer_opening(file, tokenizer):
            yield update

    with gr.Group(visible=False):
        name, count, tile = gr.Textbox(label="Tokenizer"), gr.Number(label="Count"), gr.Checkbox(False, label="Tile")
        restored, file = gr.Image(label="Restored", format="png"), gr.File(label="File")
        details = gr.JSON(label="Details")
        start, back = gr.Button("Tokenize"), gr.Button("Detokenize")
    given, answered = [image, name, count, tile], [restored, file, details]
    start.click(tokenize, given, answered, api_name="tokenize", **ON_THE_MODEL)
    back.click(detokenize, [file, name], [restored, details], api_name="detokenize", **ON_THE_MODEL)


async def show_restoring(tokenizer: Any, image: Any, count: Any, tile: Any = False) -> AsyncIterator[tuple[Any, ...]]:
    """Restore for the page: yields updates of its outputs, in the order of `OUTPUTS`.

    An error becomes a toast that says what to do; images and fields stay as they are.

    Args:
        image: what an upload answers.
        tokenizer, count, tile: as of `TokenizeRequest`.
    """
    shown = None
    try:
        path, control = uploaded(image), tokenizer_length_control((tokenizer or "").strip())
        async for found in restore(TokenizeRequest(tokenizer, path, count if control else None, tile)):
            if found.decoded is None:
                yield _updates(status=LOADING)
                continue
            fresh = {} if found.decoded is shown else _restored(found, path, tokenizer)
            shown = found.decoded
            yield _updates(**fresh, codecs=_codecs(found, path, tokenizer), codes=_codes(found), status=_status(found))
    except Exception as error:
        yield _refused(error)


async def show_opening(tokenizer: Any, file: Any) -> AsyncIterator[tuple[Any, ...]]:
    """Decode an `.odp` file for the page: yields updates as `show_restoring` does."""
    try:
        async for found in open_file(DetokenizeRequest(tokenizer, uploaded(file))):
            if found.image is None:
                yield _updates(status=LOADING)
                continue
            yield _updates(
                pair=gr.update(visible=False),
                opened=gr.update(value=named_png(readable(found.image), *_opened_name(found, file)), visible=True),
                codecs=gr.update(visible=False),
                codes="",
                download=gr.update(visible=False),
                status=status_line(
                    f"{found.image.width} x {found.image.height} pixels from {found.tokens} tokens.",
                    state="done",
                    details=[("bytes", f"{found.bytes}"), ("tokenizer", short_name(found.tokenizer))],
                ),
            )
    except Exception as error:
        yield _refused(error)


async def answer_restoring(image: Any, tokenizer: Any, count: Any, tile: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Restore for a program: yields (image, file, details).

    Args:
        image: what an upload answers.
        tokenizer, count, tile: as of `TokenizeRequest`.

    Raises:
        StudioError: a mistake, with the sentence that the page shows.
    """
    path = uploaded(image)
    async for found in restore(TokenizeRequest(tokenizer, path, count, tile)):
        if found.decoded is not None:
            image = named_png(resized(found.decoded, found.size), *_name(found, path, tokenizer))
            yield image, _odp(found, path), _details(found, tokenizer)


async def answer_opening(file: Any, tokenizer: Any) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """Decode an `.odp` file for a program: yields (image, details).

    Args:
        file: what an upload answers.
        tokenizer: as of `DetokenizeRequest`.

    Raises:
        StudioError: a mistake, with the sentence that the page shows.
    """
    async for found in open_file(DetokenizeRequest(tokenizer, uploaded(file))):
        if found.image is not None:
            size = {"width": found.image.width, "height": found.image.height}
            counts = {"tokenizer": found.tokenizer, "tokens": found.tokens, "bytes": found.bytes}
            yield named_png(found.image, *_opened_name(found, file)), {**counts, **size}


def _updates(**changes: Any) -> tuple[Any, ...]:
    return tuple(changes.get(name, gr.skip()) for name in OUTPUTS)


def _refused(error: Exception) -> tuple[Any, ...]:
    toast(sentence_of(error))
    return _updates(status=FAILED)


def _name(found: Restoration, path: str, tokenizer: Any) -> list[str]:
    """What the names of files of a restored image are made of."""
    tiles = ["tiles"] if found.tiles else []
    return [Path(path).stem, short_name(tokenizer), f"{found.tokens} tokens", *tiles]


def _opened_name(found: Opened, file: Any) -> list[str]:
    return [Path(uploaded(file)).stem, short_name(found.tokenizer), f"{found.tokens} tokens"]


def _restored(found: Restoration, path: str, tokenizer: Any) -> dict[str, Any]:
    assert found.original is not None
    count = (
        gr.skip() if found.control is None else gr.update(**{**_control_settings(found.control), "value": found.count})
    )
    return {
        "pair": gr.update(
            value=(
                named_png(found.original, Path(path).stem, "original"),
                named_png(found.restored, *_name(found, path, tokenizer)),
            ),
            visible=True,
        ),
        "opened": gr.update(visible=False),
        "count": count,
        "download": gr.update(value=_odp(found, path), visible=found.file is not None),
    }


def _odp(found: Restoration, path: str) -> str | None:
    """The path of the `.odp` file that the app serves; `None` where there is none."""
    if found.file is None:
        return None
    return save_bytes_to_cache(found.file, f"{Path(path).stem}.odp", get_upload_folder())


def _codecs(found: Restoration, path: str, tokenizer: str) -> Any:
    if found.bytes is None or found.original is None:
        return gr.update(visible=False)
    own = named_png(found.restored, *_name(found, path, tokenizer))
    images = [(own, codec_caption(short_name(tokenizer), found.bytes, found.psnr))]
    for rival in found.rivals:
        if way := rival.best:
            size = counted_bytes(way, found)
            restored = resized(way.restored, found.original.size)
            named = named_png(restored, Path(path).stem, rival.codec, f"{size} bytes")
            images.append((named, codec_caption(CODECS[rival.codec], size, way.psnr)))
    return gr.update(value=images, visible=True, selected_index=None)


def _codes(found: Restoration) -> str:
    return f"{comparison_note(found)}{code_grids(found.planes)}"


def _status(found: Restoration) -> str:
    done = found.bytes is None or len(found.rivals) == len(CODECS)
    of = f" of {found.control.most * (found.tiles or 1)}" if found.control and found.control.name == "length" else ""
    size = f"{found.side} x {found.side}"
    squares = f"{found.tiles} tiles of {size}" if found.tiles else f"a {size} square"
    text = f"Restored from {found.tokens}{of} tokens of {squares}."
    if not done:
        trying = list(CODECS.values())[len(found.rivals)]
        fraction = (1 + len(found.rivals)) / (1 + len(CODECS))
        return status_line(f"{text} Trying {trying} …", state="running", fraction=fraction)
    sizes = [] if found.bytes is None else [
        ("bytes", f"{found.bytes}"),
        ("bits per pixel", f"{8 * found.bytes / (found.size[0] * found.size[1]):.2g}"),
    ]  # fmt: skip
    spent = [(name, duration(seconds)) for name, seconds in found.seconds.items()]
    return status_line(text, state="done", details=[*sizes, ("PSNR", f"{found.psnr:.1f} dB"), *spent])


def _details(found: Restoration, tokenizer: Any) -> dict[str, Any]:
    kept = {"tokens": found.tokens, "bits": found.bits, "bytes": found.bytes, "counted": found.counted}
    count = {found.control.name: found.count} if found.control else {}
    rivals = {rival.codec: _rival_details(rival, found) for rival in found.rivals}
    details = {"tokenizer": tokenizer, "tiles": found.tiles, **count, **kept, "psnr": found.psnr}
    return {**details, "seconds": found.seconds, "beside": rivals}


def _rival_details(rival: Rival, found: Restoration) -> dict[str, Any]:
    best = rival.best and {"bytes": counted_bytes(rival.best, found), "psnr": rival.best.psnr}
    return {"best": best, "smallest_file": rival.smallest}
