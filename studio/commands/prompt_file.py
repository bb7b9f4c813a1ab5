"""The file of `studio generate --prompts`: a JSON object a line, with the names of the command's own options."""

import hashlib
import json
import os
from dataclasses import dataclass

from studio import decoding_options
from studio.checks import (
    MAX_INTEGER,
    MAX_NUMBER,
    check_integer,
    check_number,
    first_line,
    is_unicode,
    shown,
    unrepeated,
)
from studio.commands.decodings import check_given, flag, given
from studio.errors import StudioError
from studio.files import user_path

_SAMPLING = {
    "guidance": "guidance_scale",
    "cfg_interval": "cfg_interval",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "num_tokens": "num_tokens",
}
_OPTIONS = {name: next(iter(owners.values())) for name, owners in decoding_options().items()}
_KINDS = {
    "prompt": str,
    "class_label": int,
    "seed": int,
    "num_images": int,
    "guidance": float,
    "cfg_interval": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "num_tokens": int,
    "decoding": str,
    **{name: option.kind for name, option in _OPTIONS.items()},
}
_SMALLEST = {"num_images": 1, "num_tokens": 1, "cfg_interval": -1}
_SMALLEST |= {name: option.least for name, option in _OPTIONS.items() if option.least is not None}
_MOST_IMAGES = 1_000_000
_LARGEST = {"num_images": _MOST_IMAGES, "seed": MAX_INTEGER - _MOST_IMAGES}
_SEEDS = 2**48
_MOST_CHARACTERS = 256 << 20


@dataclass(frozen=True)
class Request:
    """What one line asks for.

    Args:
        line: its number in the file, from 1.
        prompt, class_label: what to sample; one of them is `None`. A class has a number or a name.
        seed: of its first image; the next use seed + 1, ...
        num_images: how many images.
        settings: arguments of the pipeline that differ from its own.
        decoding: what `studio.commands.decodings.given` returns.
        approximate: whether images do not follow the model's distribution then; known when the model is.
    """

    line: int
    prompt: str | None
    class_label: int | str | None
    seed: int
    num_images: int
    settings: dict
    decoding: dict
    approximate: bool = False


def read_prompts(file: str, base_seed: int = 0, options: dict | None = None) -> list[Request]:
    """Read a file of prompts, and refuse it at the first line that is wrong.

    Args:
        file: UTF-8, one JSON object a line; empty lines are skipped. `prompt` (or `class_label`) is required.
        base_seed: lines without a seed get one derived from this and their number.
        options: what lines take where they leave it out, by the same names; those of a decoding go to the lines that
            have this decoding.

    Returns:
        A list of `Request`, one per line.

    Raises:
        StudioError: the file cannot be read, holds no prompt, or a line is not as above; it names the line. Or options
            of a decoding that no line has.
    """
    path, options = user_path(file), options or {}
    requests: list[Request] = []
    of_decoding = [name for name in _OPTIONS if name in options]
    check_given(options.get("decoding"), **{name: options[name] for name in of_decoding})
    if os.path.exists(path) and not os.path.isfile(path):
        raise StudioError(f"{path} is no file: give a file with one JSON object a line.")
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as opened:
            text = opened.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise StudioError(f"{path} has more than {_MOST_CHARACTERS >> 20} million characters: split it.")
        lines = text.split("\n")
    except StudioError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise StudioError(f"{path} cannot be read ({reason}): give a file with one JSON object a line.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(number, _fields(line), base_seed, options))
        except StudioError as error:
            raise StudioError(f"{path}, line {number}: {error}") from error
    if (images := sum(request.num_images for request in requests)) > _MOST_IMAGES:
        raise StudioError(f"{path} asks for {images} images: a run samples at most {_MOST_IMAGES}, so split the file.")
    if not requests:
        raise StudioError(f'{path} holds no prompts: write lines such as {{"prompt": "a red apple"}}.')
    if of_decoding and all(request.decoding["name"] != options.get("decoding") for request in requests):
        flags = " and ".join(map(flag, of_decoding))
        raise StudioError(f"Every line of {path} names another decoding, and none takes {flags}: leave {flags} out.")
    return requests


def line_seed(base_seed: int, line: int) -> int:
    """The seed of a line that has none: a number below 2**48 that depends on the base seed and the line's number."""
    digest = hashlib.sha256(f"{base_seed} {line}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _SEEDS


def _fields(line):
    try:
        fields = json.loads(line, object_pairs_hook=unrepeated)
    except StudioError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise StudioError(f"this is no JSON ({reason}).") from error
    if not isinstance(fields, dict):
        raise StudioError('this is no JSON object: write {"prompt": "a red apple"}.')
    for name, value in fields.items():
        if name not in _KINDS:
            raise StudioError(f"{shown(name)} is unknown: use {', '.join(_KINDS)}.")
        if value is not None:
            _check(name, value)
    return {name: value for name, value in fields.items() if value is not None}


def _check(name, value):
    kind = str if name == "class_label" and isinstance(value, str) else _KINDS[name]
    if kind is int:
        check_integer(name, value, _SMALLEST.get(name, 0), _LARGEST.get(name, MAX_INTEGER))
    elif kind is float:
        check_number(name, value, -MAX_NUMBER)
    elif not isinstance(value, str) or not is_unicode(value):
        raise StudioError(f"{name} must be text of valid Unicode, not {shown(value)}.")


def _request(number, fields, base_seed, options):
    if ("prompt" in fields) == ("class_label" in fields):
        raise StudioError('say what to sample: a prompt such as "a red apple", or class_label for such a model.')
    if fields.get("decoding", options.get("decoding")) != options.get("decoding"):
        options = {name: value for name, value in options.items() if name not in _OPTIONS}  # none of this decoding's
    chosen = {**options, **fields}
    decoding = given(chosen.get("decoding"), **{name: chosen[name] for name in _OPTIONS if name in chosen})
    check_given(**decoding)
    return Request(
        line=number,
        prompt=chosen.get("prompt"),
        class_label=chosen.get("class_label"),
        seed=chosen.get("seed", line_seed(base_seed, number)),
        num_images=chosen.get("num_images", 1),
        settings={argument: chosen[name] for name, argument in _SAMPLING.items() if name in chosen},
        decoding=decoding,
    )
