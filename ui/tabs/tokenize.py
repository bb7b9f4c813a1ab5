"""The Tokenize tab: an image turned into tokens and back, beside JPEG and WebP of as many bytes."""

from pathlib import Path

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from studio.checkpoints.bundled import DEFAULT_TOKENIZER
from studio.ui.jobs.tokenize_job import CODECS, DetokenizeRequest, TokenizeRequest, open_file, restore
from studio.ui.render.codecs import codec_caption, comparison_note, counted_bytes
from studio.ui.render.sizes import readable, resized
from studio.ui.render.token_grid import code_grids
from studio.ui.server.failures import sentence_of, toast
from studio.ui.server.models import bundled_models, tokenizer_length_control
from studio.ui.tabs.actions import FAILED, ON_THE_MODEL, PRIVATE, connect_actions
from studio.ui.tabs.components import duration, image_grid, short_name, status_line, uploaded
from studio.ui.tabs.examples import example

OUTPUTS = ("pair", "opened", "codecs", "codes", "count", "download", "status")
EXAMPLES = ("scene-melon.png", "scene-ewes.png")
IDLE = status_line("Give any image, and see what is left of it when it is turned into tokens and back.")
LOADING = status_line("Loading the tokenizer …", state="running", fraction=0)
_SCALES = {
    "length": ("Length", "How many of the first tokens to keep; the first ones matter most."),
    "depth": ("Depth", "How many levels of codes to keep, coarse to fine."),
}


def build_tab():
    """Lay the tab out inside the current Blocks and connect it; the tokenizer is loaded by the first image.

    Returns:
        The field of the image.
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
            codecs = image_grid(
                label="The same bytes", show_label=False, columns=3, visible=False, elem_id="codecs", captioned=True
            )
            codes = gr.HTML("", elem_id="codes", elem_classes="studio-line")
        with gr.Column(elem_classes="area-tune"):
            tokenizer = gr.Dropdown(
                names,
                value=first,
                label="Tokenizer",
                info="A bundled one, a folder of one or of a model that samples, or a Hugging Face id.",
                allow_custom_value=True,
                elem_id="tokenizer",
            )
            scale = {"maximum": 2} | _scale_settings(tokenizer_length_control(first))  # an argument by position would win
            count = gr.Slider(minimum=1, step=1, elem_id="scale", buttons=[], **scale)
            tile = gr.Checkbox(
                False,
                label="Tiles",
                info="Cut the image into squares of the tokenizer's size instead of shrinking it to one; each then "
                "has this length. With One-D-Piece tokenizers only.",
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
        lambda name: gr.update(**_scale_settings(tokenizer_length_control((name or "").strip()))),
        tokenizer,
        count,
        queue=False,
        **PRIVATE,
    )
    _endpoints(image)
    return image


def _scale_settings(scale):
    if scale is None:
        return {"visible": False}
    label, info = _SCALES[scale.name]
    return {"visible": True, "maximum": scale.most, "value": scale.most, "label": label, "info": info}


def _endpoints(image):
    """What programs call."""

    async def tokenize(image, tokenizer, count=None, tile=False):
        """Turn an image into tokens and back; streams the restored image, then what JPEG and WebP make of it.

        Args:
            image: an image file of any size; a tool is given its data (data:image/png;base64,... text), no link.
            tokenizer: a bundled one such as "emoji-vq", a folder, also of a model that samples, or a Hugging Face id.
            count: the length in tokens or the depth in levels to restore it from; all when empty.
            tile: cut it into squares of the tokenizer's size instead of resizing it to one; only for a One-D-Piece.

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
            tokenizer: the One-D-Piece tokenizer that it was made with, where the file names none that is bundled.

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


async def show_restoring(tokenizer, image, count, tile=False):
    """Restore for the page: yields updates of its outputs, in the order of `OUTPUTS`.

    What is wrong becomes a toast that says what to do; images and fields stay as they are.
    """
    shown = None
    try:
        path, scale = uploaded(image), tokenizer_length_control((tokenizer or "").strip())
        async for found in restore(TokenizeRequest(tokenizer, path, count if scale else None, tile)):
            if found.decoded is None:
                yield _updates(status=LOADING)
                continue
            fresh = {} if found.decoded is shown else _restored(found, path)
            shown = found.decoded
            yield _updates(**fresh, codecs=_codecs(found, tokenizer), codes=_codes(found), status=_status(found))
    except Exception as error:
        yield _refused(error)


async def show_opening(tokenizer, file):
    """Restore the image of a file for the page: yields updates as `show_restoring` does."""
    try:
        async for found in open_file(DetokenizeRequest(tokenizer, uploaded(file))):
            if found.image is None:
                yield _updates(status=LOADING)
                continue
            yield _updates(
                pair=gr.update(visible=False),
                opened=gr.update(value=readable(found.image), visible=True),
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


async def answer_restoring(image, tokenizer, count, tile):
    """Restore for a program: yields (image, file, details); what is wrong becomes an error with the same sentence."""
    path = uploaded(image)
    async for found in restore(TokenizeRequest(tokenizer, path, count, tile)):
        if found.decoded is not None:
            yield resized(found.decoded, found.size), _odp(found, path), _details(found, tokenizer)


async def answer_opening(file, tokenizer):
    """Restore the image of a file for a program: yields (image, details)."""
    async for found in open_file(DetokenizeRequest(tokenizer, uploaded(file))):
        if found.image is not None:
            size = {"width": found.image.width, "height": found.image.height}
            counts = {"tokenizer": found.tokenizer, "tokens": found.tokens, "bytes": found.bytes}
            yield found.image, {**counts, **size}


def _updates(**changes):
    return tuple(changes.get(name, gr.skip()) for name in OUTPUTS)


def _refused(error):
    toast(sentence_of(error))
    return _updates(status=FAILED)


def _restored(found, path):
    scale = gr.skip() if found.scale is None else gr.update(**{**_scale_settings(found.scale), "value": found.count})
    return {
        "pair": gr.update(value=(found.original, found.restored), visible=True),
        "opened": gr.update(visible=False),
        "count": scale,
        "download": gr.update(value=_odp(found, path), visible=found.file is not None),
    }


def _odp(found, path):
    """The path of the `.odp` file, where the app serves it from; `None` where there is none."""
    if found.file is None:
        return None
    return save_bytes_to_cache(found.file, f"{Path(path).stem}.odp", get_upload_folder())


def _codecs(found, tokenizer):
    if found.bytes is None:
        return gr.update(visible=False)
    images = [(found.restored, codec_caption(short_name(tokenizer), found.bytes, found.psnr))]
    for rival in found.rivals:
        if way := rival.best:
            restored = resized(way.restored, found.original.size)
            images.append((restored, codec_caption(CODECS[rival.codec], counted_bytes(way, found), way.psnr)))
    return gr.update(value=images, visible=True, selected_index=None)


def _codes(found):
    return f"{comparison_note(found)}{code_grids(found.planes)}"


def _status(found):
    done = found.bytes is None or len(found.rivals) == len(CODECS)
    of = f" of {found.scale.most * (found.tiles or 1)}" if found.scale and found.scale.name == "length" else ""
    size = f"{found.side} x {found.side}"
    squares = f"{found.tiles} tiles of {size}" if found.tiles else f"a {size} square"
    text = f"Restored from {found.tokens}{of} tokens of {squares}."
    if not done:
        trying = list(CODECS.values())[len(found.rivals)]
        share = (1 + len(found.rivals)) / (1 + len(CODECS))
        return status_line(f"{text} Trying {trying} …", state="running", fraction=share)
    sizes = [] if found.bytes is None else [
        ("bytes", f"{found.bytes}"),
        ("bits a pixel", f"{8 * found.bytes / (found.size[0] * found.size[1]):.2g}"),
    ]  # fmt: skip
    spent = [(name, duration(seconds)) for name, seconds in found.seconds.items()]
    return status_line(text, state="done", details=[*sizes, ("PSNR", f"{found.psnr:.1f} dB"), *spent])


def _details(found, tokenizer):
    kept = {"tokens": found.tokens, "bits": found.bits, "bytes": found.bytes, "counted": found.counted}
    scale = {found.scale.name: found.count} if found.scale else {}
    rivals = {rival.codec: _rival_details(rival, found) for rival in found.rivals}
    told = {"tokenizer": tokenizer, "tiles": found.tiles, **scale, **kept, "psnr": found.psnr}
    return {**told, "seconds": found.seconds, "beside": rivals}


def _rival_details(rival, found):
    best = rival.best and {"bytes": counted_bytes(rival.best, found), "psnr": rival.best.psnr}
    return {"best": best, "smallest_file": rival.least}
