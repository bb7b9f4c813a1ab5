"""`studio tokenize`, `studio detokenize` and `studio bench rate-distortion`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from studio.checkpoints.bundled import BUNDLED, DEFAULT_TOKENIZER
from studio.checks import printable, shown
from studio.commands.options import Device, Json, Seed, number
from studio.commands.outputs import check_figure, save_figure
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError

MOST_BYTES = 1 << 23  # the longest file with as many tokens as are read has fewer


def tokenize(
    image: Annotated[Path, typer.Argument(help="The image.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .odp file to write.")],
    tokenizer: Annotated[
        str, typer.Option(help="A One-D-Piece tokenizer: a bundled name, a folder or a Hub id.")
    ] = DEFAULT_TOKENIZER,
    length: Annotated[
        int | None, typer.Option(min=1, help="Number of tokens to keep, over all tiles.", show_default="all")
    ] = None,
    psnr: Annotated[
        float | None, number(help="Instead of --length: the fewest tokens that reach this PSNR in dB.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--bytes", min=1, help="Instead of --length: the largest size of the file in bytes.", show_default=False
        ),
    ] = None,
    tile: Annotated[
        bool, typer.Option("--tile", help="Cut the image into tiles of the tokenizer's size instead of resizing it.")
    ] = False,
    refine: Annotated[
        int, typer.Option(min=0, help="Steps of a search for tokens with less error; 20 are a good start.")
    ] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compress an image to a file of tokens."""
    if sum(given is not None for given in (length, psnr, size)) > 1:
        raise StudioError("Give one of --length, --psnr and --bytes: each decides the number of tokens alone.")
    if out.suffix.lower() != ".odp":
        raise StudioError(f"{out} does not end in .odp: that is the ending of files of tokens.")

    from studio.commands.outputs import check_apart, save
    from studio.images import open_image
    from studio.saving import check_writable

    original = open_image(image)
    check_apart(out, image)
    check_writable(out)
    model, name = _load(tokenizer, device)

    from studio import encode_image

    encoded = encode_image(original, model, length=length, psnr=psnr, size=size, tile=tile, refine=refine, name=name)
    save({out: lambda path: path.write_bytes(encoded.data)})
    width, height = original.size
    tokens, written = len(encoded.file.tokens), len(encoded.data)
    emit(
        {
            "path": str(out),
            "tokenizer": tokenizer,
            "checksum": f"{encoded.file.checksum:08x}",
            "width": width,
            "height": height,
            "tiled": tile,
            "refine": refine,
            "length": tokens,
            "bytes": written,
            "payload_bytes": encoded.file.payload_bytes,
            "bits_per_pixel": 8 * written / (width * height),
            "psnr": encoded.psnr,
        }
    )
    say(f"{out}  {tokens} tokens, {written} bytes, {encoded.psnr:.2f} dB")


def detokenize(
    file: Annotated[Path, typer.Argument(help="The .odp file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .png file to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="The tokenizer that the file was made with.", show_default="the one that the file names"),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Decode a file of tokens to an image."""
    from studio.commands.outputs import check_apart, save
    from studio.saving import check_writable, png_writer

    if out.suffix.lower() != ".png":
        raise StudioError(f"{out} does not end in .png: images are written as PNG.")
    data = _read(file)
    check_apart(out, file)
    check_writable(out)

    from studio import OdpFile, decode_image

    content = OdpFile.from_bytes(data, str(file))
    if not (tokenizer or content.tokenizer):
        raise StudioError(f"{file} names no bundled tokenizer: give the folder of its tokenizer with --tokenizer.")
    chosen = tokenizer or content.tokenizer
    model, _ = _load(chosen, device)
    image = decode_image(content, model, str(file))
    call = {"file": printable(file.name), "tokenizer": chosen, "length": len(content.tokens), "tiled": content.tiled}
    save({out: png_writer(image, call, None)})
    emit({"path": str(out), "width": image.width, "height": image.height, **call})
    say(f"{out}  {image.width} x {image.height} pixels from {len(content.tokens)} tokens")


def rate_distortion(
    tokenizer: Annotated[str, typer.Option(help="A One-D-Piece tokenizer.")] = DEFAULT_TOKENIZER,
    samples: Annotated[int, typer.Option(min=65, help="Images of held-out concepts.")] = 136,
    refine: Annotated[int, typer.Option(min=0, help="Steps of a search for better tokens, as in studio tokenize.")] = 0,
    seed: Seed = 0,
    figure: Annotated[
        Path | None, typer.Option(help="Write a chart of quality over bytes to this SVG file.", show_default=False)
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(help="Quality in the chart: psnr or frechet.", show_default="psnr"),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare a tokenizer with JPEG and WebP at equal file sizes."""
    if measure not in (None, "psnr", "frechet"):
        raise StudioError(f"The figure shows psnr or frechet, not {shown(measure)}.")
    if figure is None and measure is not None:
        raise StudioError("--measure belongs to --figure: give --figure too.")
    check_figure(figure)
    model, name = _load(tokenizer, device)

    from studio.bench.rate_distortion import bench_rate_distortion, rate_distortion_chart
    from studio.bench.report import records_table

    result = bench_rate_distortion(model, name=name, samples=samples, refine=refine, seed=seed, device=device)
    save_figure(figure, lambda: rate_distortion_chart(result["rows"], measure or "psnr"))
    emit(result)
    say(records_table(result["rows"]))


def _load(name, device):
    """A One-D-Piece tokenizer, and its name if it is bundled, otherwise an empty string."""
    from studio import OneDPieceTokenizer, load

    quiet_libraries()
    model = load(name, device=device, dtype="float32")
    if not isinstance(model, OneDPieceTokenizer):
        raise StudioError(f"{name} is no One-D-Piece tokenizer: only their first tokens are an image by themselves.")
    return model, name if name in BUNDLED else ""


def _read(file):
    """The bytes of a file, at most the first 8 MiB: a longer one is no .odp file and could fill the memory."""
    if not os.path.isfile(file):
        raise StudioError(f"There is no file {file}.")
    try:
        with file.open("rb") as opened:
            return opened.read(MOST_BYTES)
    except OSError as error:
        raise StudioError(f"{file} cannot be read: {error.strerror or error}.") from error
