"""`studio generate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.commands.decodings import (
    Tolerance,
    check_auto,
    check_given,
    check_packed,
    decoding_of,
    given,
    named,
    picked,
    shown_name,
    with_decoding,
)
from studio.commands.options import (
    Device,
    Guidance,
    ImageCount,
    Json,
    Model,
    SamplingDtype,
    Temperature,
    check_condition,
    number,
    seeds_of,
)
from studio.console import emit, quiet_libraries, say, warn
from studio.errors import StudioError
from studio.files import user_path


@with_decoding
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='What to sample, such as "a red apple".', show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Sample a file of lines such as {"prompt": "a red apple", "num_images": 2}, with the names of these '
            "options; in several processes too (accelerate launch -m studio ...), and going on where it stopped.",
            show_default=False,
        ),
    ] = None,
    model: Model = "emoji-ar",
    num_images: ImageCount = 1,
    class_label: Annotated[
        str | None,
        typer.Option(
            help='The class to sample, for class-conditional models: its number, or a name such as "golden retriever".',
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**63 - 1,
            help="Seed of the first image; the next use seed+1, ... With --prompts, what seeds are derived from.",
            show_default="sampled; 0 with --prompts",
        ),
    ] = None,
    guidance: Guidance = None,
    cfg_interval: Annotated[
        int,
        typer.Option(min=-1, help="Index of the last token but one that is guided, as in LlamaGen's code (-1: all)."),
    ] = -1,
    temperature: Temperature = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from the k likeliest tokens (0: all).", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, number(help="Sample from the likeliest tokens that make up this fraction (0-1).")
    ] = None,
    num_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many tokens to sample of a model whose first ones are an image.", show_default="all"
        ),
    ] = None,
    decoding: str | None = None,
    options: dict | None = None,
    tolerance: Tolerance = None,
    device: Device = None,
    dtype: SamplingDtype = None,
    out: Annotated[
        Path, typer.Option(help="A file if it ends in .png (name-0.png, ... for several), else a folder.")
    ] = Path("out"),
    sheet: Annotated[bool, typer.Option("--sheet", help="Also write all images as one sheet.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="With --prompts: images sampled at a time.", show_default="1 to 8 by their number"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate images from a prompt."""
    options = options or {}
    sampling: dict[str, Any] = {
        "cfg_interval": cfg_interval,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if cfg_interval == -1:
        del sampling["cfg_interval"]
    if prompts is not None:
        if prompt is not None or class_label is not None or out.suffix.lower() == ".png":
            raise StudioError("With --prompts the lines say what to sample, and --out is a folder: leave out the rest.")
        if decoding == "auto" or tolerance is not None:
            raise StudioError("With --prompts every process must sample alike: name the decoding, and leave out auto.")
        from studio.commands.generate_batch import generate_many

        fields: dict[str, Any] = {"num_images": num_images, "guidance": guidance, **sampling, "num_tokens": num_tokens}
        fields |= {"decoding": decoding, **options}
        fields = {name: value for name, value in fields.items() if value is not None}
        generate_many(
            prompts,
            user_path(out),
            model=model,
            seed=seed or 0,
            options=fields,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            sheet=sheet,
        )
        return
    if batch_size is not None:
        raise StudioError("--batch-size goes with --prompts: the images of one prompt are sampled together.")
    check_condition(prompt, class_label)
    settings = sampling if guidance is None else {"guidance_scale": guidance, **sampling}
    settings |= {} if num_tokens is None else {"num_tokens": num_tokens}
    if dtype == "int8" and decoding not in (None, "ar"):
        raise StudioError("--dtype int8 goes with --decoding ar only.")
    chosen = given("ar" if dtype == "int8" else decoding, **options)
    check_auto(decoding, tolerance, [name for name in chosen if name != "name"])
    if decoding != "auto":
        check_given(**chosen)
    _generate(prompt, class_label, model, num_images, seed, settings, chosen, tolerance, device, dtype, out, sheet)


def _generate(prompt, class_label, model, num_images, seed, settings, decoding, tolerance, device, dtype, out, sheet):
    from studio.commands.outputs import save
    from studio.saving import make_sheet, plan_paths, png_writer, save_new

    seeds = seeds_of(seed, num_images)
    paths, sheet_path = plan_paths(out, prompt or f"class {class_label}", seeds, sheet)

    import torch

    from studio import Autoregressive, load
    from studio.checkpoints.vocabulary import prompt_warning

    packed = dtype == "int8"
    quiet_libraries()
    pipe = load(model, device=device, dtype=None if packed else dtype)
    if hasattr(pipe, "processor"):
        raise StudioError(f"{model} answers questions about images: use studio ask, or a pipeline such as emoji-ar.")
    if not callable(pipe) or not hasattr(pipe, "image_tokenizer"):
        raise StudioError(f"{model} turns images into tokens and cannot sample: use a pipeline such as emoji-ar.")
    check_packed(dtype, model, pipe)
    is_auto = decoding["name"] == "auto"
    decoding = picked(model, pipe, num_images, tolerance) if is_auto else named(pipe=pipe, **decoding)
    how = Autoregressive(weights="int8") if packed else decoding_of(**decoding)
    pipe.check_arguments(settings)
    class_label = None if class_label is None else pipe.class_index(class_label)
    pipe.check_call(prompt, class_labels=class_label, num_images_per_prompt=num_images, decoding=how, **settings)
    if validation_warning := pipe.validation_warning(how):
        warn(validation_warning)
    if warning := prompt_warning(pipe, prompt):
        warn(warning)
    output = pipe(
        prompt,
        class_labels=class_label,
        num_images_per_prompt=num_images,
        generator=[torch.Generator().manual_seed(each) for each in seeds],
        decoding=how,
        **settings,
    )

    call = {"model": model, "prompt": prompt, "class_label": class_label, "num_images": num_images, **settings}
    call |= {
        "decoding": {**decoding, "approximate": True} if getattr(how, "approximate", False) else decoding,
        "device": str(pipe.device),
        "dtype": "int8" if packed else str(pipe.transformer.dtype).removeprefix("torch."),
    }
    writers = {path: png_writer(image, call, each) for path, image, each in zip(paths, output.images, seeds)}
    if sheet_path:
        writers[sheet_path] = png_writer(make_sheet(output.images), call, seeds)
    if out.suffix.lower() == ".png":
        save(writers)
    else:
        records = {path: (call, each) for path, each in zip([*paths, sheet_path], [*seeds, seeds])}
        paths = save_new(writers, records)
        sheet_path = paths.pop() if sheet_path else None

    stats = output.stats
    sampled_from = output.prompts if set(output.prompts or [prompt]) != {prompt} else None
    emit(
        {
            "model": model,
            "decoding": stats.decoding or shown_name(decoding["name"], how),
            "images": [{"path": str(path), "seed": each} for path, each in zip(paths, seeds)],
            **({"sheet": str(sheet_path)} if sheet_path else {}),
            **({"prompts": sampled_from} if sampled_from else {}),
            "tokens": stats.tokens,
            "target_calls": stats.target_calls,
            "mean_accepted_length": stats.mean_accepted_length,
            **({} if stats.acceptance is None else {"acceptance": stats.acceptance}),
            **({} if stats.window is None else {"window": stats.window}),
            "seconds": stats.seconds,
        }
    )
    for path, each, words in zip(paths, seeds, sampled_from or [""] * num_images):
        say(f"{path}  seed {each}  {words}".rstrip())
    if sheet_path:
        say(f"{sheet_path}  all {num_images}")
    total, decode = stats.seconds["total"], stats.seconds["decode"]
    taken = "" if stats.decoding is None else f", {stats.decoding} decoding"
    say(f"{total:.1f} seconds, {stats.tokens} tokens, {stats.tokens / max(decode, 1e-9):.0f} tokens per second{taken}")
