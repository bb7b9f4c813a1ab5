"""`studio edit`."""

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from studio.checks import check_integer, shown
from studio.commands.decodings import check_given, decoding_of, given, named, with_decoding
from studio.commands.options import (
    Device,
    Dtype,
    Guidance,
    ImageCount,
    Json,
    Model,
    Temperature,
    check_condition,
    number,
    seeds_of,
)
from studio.console import emit, quiet_libraries, say, warn
from studio.errors import StudioError
from studio.files import user_path


@with_decoding
def edit(
    image: Annotated[Path, typer.Argument(help="The image file to edit.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Argument(help='What the redrawn part shows, such as "a red apple".', show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="An image that is white where to redraw.", show_default=False)
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(help="Redraw a box in place of a mask: X,Y,WIDTH,HEIGHT in pixels.", show_default=False),
    ] = None,
    expand: Annotated[
        str | None,
        typer.Option(help="Pixels to add by side, such as left=64,right=64 (also top, bottom).", show_default=False),
    ] = None,
    strength: Annotated[
        float,
        number(help="Share of the masked cells to redraw; without a mask, of all: a variation.", show_default=True),
    ] = 1.0,
    padding: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Redraw a square around the mask with this margin in pixels, at the model's full resolution.",
            show_default="the shorter side of the image",
        ),
    ] = None,
    soft_edge: Annotated[
        int | None,
        typer.Option(min=0, help="Pixels over which the edge of the mask fades.", show_default="half a cell"),
    ] = None,
    model: Model = "emoji-mar",
    class_label: Annotated[
        str | None,
        typer.Option(
            help='Class to generate, for class-conditional models: its number, or a name such as "golden retriever".',
            show_default=False,
        ),
    ] = None,
    num_images: ImageCount = 1,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, help="Seed of the first image; the next use seed+1, ...", show_default="sampled"
        ),
    ] = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    decoding: str | None = None,
    options: dict | None = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="A file if it ends in .png (name-0.png, ... for several), else a folder."),
    ] = Path("out"),
    as_json: Json = False,
) -> None:
    """Redraw a part of an image, expand it, or make variations of it."""
    check_condition(prompt, class_label)
    if mask is not None and box is not None:
        raise StudioError("Give --mask or --box, not both.")
    if mask is None and box is None and expand is None and (padding is not None or soft_edge is not None):
        raise StudioError("--padding and --soft-edge belong to a mask: give --mask or --box, or leave them out.")
    chosen = given(decoding, **(options or {}))
    check_given(**chosen)
    from studio.images import open_image

    original = open_image(image)
    request = {
        "mask_image": _mask(mask, box, original.size),
        "strength": strength,
        "expand": None if expand is None else parsed_expand(expand),
        "padding_mask_crop": padding,
        "soft_edge": soft_edge,
    }
    sampling = {"guidance_scale": guidance, "temperature": temperature}
    settings = {name: value for name, value in {**request, **sampling}.items() if value is not None}
    call = {"model": model, "prompt": prompt, "class_label": class_label, "image": image.name, **settings}
    call["mask_image"] = str(mask) if mask else box
    read = [image, mask]
    _edit(original, prompt, class_label, model, num_images, seed, settings, chosen, device, dtype, out, call, read)


def parsed_expand(text: str) -> dict[str, int]:
    """Pixels by side, from "left=64,right=64".

    Raises:
        StudioError: another form.
    """
    sides = {}
    for part in text.split(","):
        side, _, pixels = part.partition("=")
        if side.strip() in sides or not pixels.strip().isdecimal() or len(pixels) > 9:
            raise StudioError(f"--expand is sides with pixels, such as left=64,right=64, not {shown(text)}.")
        sides[side.strip()] = int(pixels)
    return sides


def parsed_box(text: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height, from "8,8,32,32", inside an image of this width and height.

    Raises:
        StudioError: another form, or a box that is not inside.
    """
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdecimal() and len(number) < 9 for number in numbers):
        raise StudioError(f"--box is X,Y,WIDTH,HEIGHT in pixels, such as 8,8,32,32, not {shown(text)}.")
    left, top, width, height = map(int, numbers)
    check_integer("The width of --box", width, 1)
    check_integer("The height of --box", height, 1)
    if left + width > size[0] or top + height > size[1]:
        raise StudioError(f"The box {shown(text)} goes beyond the image, which has {size[0]} x {size[1]} pixels.")
    return left, top, width, height


def _mask(file, box, size):
    from PIL import Image

    from studio.images import open_image

    if file is not None:
        white = open_image(file)
        if white.size != size:
            warn(f"The mask has {white.width} x {white.height} pixels, the image {size[0]} x {size[1]}: it is resized.")
            white = white.resize(size, Image.Resampling.NEAREST)
        return white
    if box is None:
        return None
    left, top, width, height = parsed_box(box, size)
    white = Image.new("L", size)
    white.paste(255, (left, top, left + width, top + height))
    return white


def _edit(original, prompt, class_label, model, num_images, seed, settings, chosen, device, dtype, out, call, read):
    from studio.commands.outputs import check_apart, save
    from studio.saving import plan_paths, png_writer, save_new

    out = user_path(out)
    seeds = seeds_of(seed, num_images)
    paths, _ = plan_paths(out, prompt or f"class {class_label}", seeds)
    if out.suffix.lower() == ".png":
        for path, file in product(paths, read):
            check_apart(path, file)

    import torch

    from studio import load
    from studio.checkpoints.vocabulary import prompt_warning

    quiet_libraries()
    pipe = load(model, device=device, dtype=dtype)
    if not callable(pipe) or not hasattr(pipe, "edit"):
        raise StudioError(f"{model} cannot edit: use a pipeline such as emoji-mar.")
    decoding = named(pipe=pipe, **chosen)
    class_label = call["class_label"] = None if class_label is None else pipe.class_index(class_label)
    if warning := prompt_warning(pipe, prompt):
        warn(warning)
    output = pipe(
        prompt,
        class_labels=class_label,
        image=original,
        num_images_per_prompt=num_images,
        generator=[torch.Generator().manual_seed(each) for each in seeds],
        decoding=decoding_of(**decoding),
        **settings,
    )
    if output.approximate:
        warn("This model samples in raster order: what was redrawn does not know of what stands behind it.")
    call |= {"decoding": decoding, "approximate": output.approximate}
    writers = {path: png_writer(image, call, each) for path, image, each in zip(paths, output.images, seeds)}
    if out.suffix.lower() == ".png":
        save(writers)
    else:
        paths = save_new(writers, {path: (call, each) for path, each in zip(paths, seeds)})
    emit(
        {
            "model": model,
            "images": [{"path": str(path), "seed": each} for path, each in zip(paths, seeds)],
            "size": list(output.images[0].size),
            "approximate": output.approximate,
            "target_calls": output.stats.target_calls,
            "tokens": output.stats.tokens,
            "seconds": output.stats.seconds,
        }
    )
    for path, each in zip(paths, seeds):
        say(f"{path}  seed {each}")
    say(f"{output.stats.seconds['total']:.1f} seconds, {output.stats.tokens} tokens")
