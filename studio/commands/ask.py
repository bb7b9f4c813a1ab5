"""`studio ask`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from studio.commands.options import Device, Dtype, Json, number
from studio.console import emit, quiet_libraries, say
from studio.errors import StudioError


def ask(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    questions: Annotated[list[str], typer.Argument(help="One question or several; the image is encoded once.")],
    prune: Annotated[
        str | None,
        typer.Option(
            help="divprune, hired, globalcom2, scope, coverage, cdpruner, mmtok, random, uniform, fastv, pyramiddrop "
            "or vscan.",
            show_default="keep all tokens",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        number(
            help="Fraction of the image's tokens to keep, with --prune or for several questions.",
            show_default="0.2 or all",
        ),
    ] = None,
    after_layer: Annotated[
        int | None,
        number(min=1, help="Prune after this layer of the language model.", show_default="the method's"),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            help="Tokens that the vision tower merges in its first layer, the second, ..., such as 56,28,14; "
            "diffrate, as learned for the model, or diffrate:36+10,28+8, merged and pruned.",
            show_default="none",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        number(
            min=1,
            help="Read the image as this many tokens, made for the question: 1, 4 or 16 with emoji-vlm, or those of a "
            "folder from `studio train quecc`.",
            show_default="off",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A bundled reader, or a vision-language model of transformers: a folder or Hub id.")
    ] = "emoji-vlm",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Answer questions about an image, with all or a few of its visual tokens."""
    from studio import load
    from studio.images import open_image

    if keep is not None and prune is None and len(questions) == 1:
        raise StudioError("--keep needs a method: add --prune divprune, or leave it out.")
    if prune is not None and len(questions) > 1:
        raise StudioError("Several questions share one cache: leave --prune out, or ask them one by one.")
    if after_layer is not None and prune is None:
        raise StudioError("--after-layer needs a method: add --prune fastv, or leave it out.")
    if tokens is not None and len(questions) > 1:
        raise StudioError("--tokens makes them for one question: ask one by one, or leave it out.")
    original = open_image(image)
    quiet_libraries()
    pipe = load(model, device=device, dtype=dtype)
    if not hasattr(pipe, "processor"):
        raise StudioError(f"{model} reads no images: use emoji-vlm, or a vision-language model of transformers.")
    merging = 0 if merge is None else merge
    if len(questions) > 1:
        _ask_all(pipe, original, questions, 1.0 if keep is None else keep, merging, max_new_tokens)
        return
    answer = pipe(
        original, questions[0], prune=prune, keep=keep, after_layer=after_layer, tokens=tokens,
        merge=merging, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    emit(
        {
            "answer": answer.answer,
            "visual_tokens": answer.visual_tokens,
            "kept_tokens": answer.kept_tokens,
            "seconds": answer.seconds,
            "cache_bytes": answer.cache_bytes,
            "tower": answer.tower and asdict(answer.tower),
        }
    )
    say(answer.answer)
    spent = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in answer.seconds.items())
    say(f"{answer.kept_tokens} of {answer.visual_tokens} visual tokens{_merged(answer.tower)}; seconds: {spent}")


def _merged(tower) -> str:
    """What the vision tower merged, in words."""
    return f", {tower.patches} patches became {tower.tokens} tokens in the tower" if tower else ""


def _ask_all(pipe, image, questions: list[str], keep: float, merge: int | str, max_new_tokens: int) -> None:
    """Encode the image once and answer all questions from a cache that keeps a fraction of its tokens."""
    memory = pipe.remember(image, keep=keep, merge=merge)
    answers = [pipe.ask(memory, question, max_new_tokens=max_new_tokens) for question in questions]
    emit(
        {
            "answers": [
                {"question": question, "answer": answer.answer, "seconds": answer.seconds}
                for question, answer in zip(questions, answers, strict=True)
            ],
            "visual_tokens": memory.visual_tokens,
            "kept_tokens": memory.kept_tokens,
            "seconds": memory.seconds,
            "cache_bytes": memory.cache_bytes,
            "tower": memory.tower and asdict(memory.tower),
        }
    )
    for answer in answers:
        say(f"{answer.answer}  ({answer.seconds['prefill'] + answer.seconds['decode']:.2f} s)")
    say(
        f"{memory.kept_tokens} of {memory.visual_tokens} visual tokens{_merged(memory.tower)}, "
        f"{memory.cache_bytes:,} bytes; seconds to read the image: {memory.seconds['remember']:.2f}"
    )
