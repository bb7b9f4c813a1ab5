"""The file of `studio generate --prompts`: a JSON object a line, with the names of the command's own options."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from studio.commands.decodings import check_given, flag, given
from studio.errors import StudioError

_SAMPLING = {
    "guidance": "guidance_scale",
    "cfg_interval": "cfg_interval",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "length": "num_tokens",
}
_DECODING = {
    "delta": float,
    "neighbours": int,
    "ratio": float,
    "drafts": str,
    "window": int,
    "coupling": str,
    "steps": int,
    "teacher_steps": int,
    "mode": str,
    "diffusion_steps": int,
    "prefill": float,
    "draft_steps": int,
    "inner_temperature": float,
    "schedule": str,
    "confidence": str,
    "confidence_temperature": float,
}
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
    "length": int,
    "decoding": str,
    **_DECODING,
}
_SMALLEST = {"num_images": 1, "length": 1, "neighbours": 1, "window": 1, "steps": 1, "cfg_interval": -1}
_SEEDS, _LARGEST_SEED = 2**48, 2**63 - 1


@dataclass(frozen=True)
class Request:
    """What one line asks for.

    Args:
        line: its number in the file, from 1.
        prompt, class_label: what to draw; one of them is `None`.
        seed: of its first picture; the next use seed + 1, ...
        num_images: how many pictures.
        settings: arguments of the pipeline that differ from its own.
        decoding: what `studio.commands.decodings.given` returns.
        approximate: whether pictures do not follow the model's law then; known when the model is.
    """

    line: int
    prompt: str | None
    class_label: int | None
    seed: int
    num_images: int
    settings: dict
    decoding: dict
    approximate: bool = False


def read_prompts(file, base_seed=0, options=None):
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
    file, requests, options = Path(file).expanduser(), [], options or {}
    of_decoding = [name for name in _DECODING if name in options]
    check_given(options.get("decoding"), **{name: options[name] for name in of_decoding})
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise StudioError(f"{file} cannot be read ({reason}): give a file with one JSON object a line.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(number, _fields(line), base_seed, options))
        except StudioError as error:
            raise StudioError(f"{file}, line {number}: {error}") from error
    if not requests:
        raise StudioError(f'{file} holds no prompts: write lines such as {{"prompt": "a red apple"}}.')
    if of_decoding and all(request.decoding["name"] != options.get("decoding") for request in requests):
        flags = " and ".join(map(flag, of_decoding))
        raise StudioError(f"Every line of {file} names another decoding, and none takes {flags}: leave {flags} out.")
    return requests


def line_seed(base_seed, line):
    """The seed of a line that has none: a number below 2**48 that depends on the base seed and the line's number."""
    digest = hashlib.sha256(f"{base_seed} {line}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _SEEDS


def _fields(line):
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise StudioError(f"this is no JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise StudioError('this is no JSON object: write {"prompt": "a red apple"}.')
    for name, value in fields.items():
        if name not in _KINDS:
            raise StudioError(f"{name!r} is unknown: use {', '.join(_KINDS)}.")
        if value is not None:
            _check(name, value)
    return {name: value for name, value in fields.items() if value is not None}


def _check(name, value):
    kind = _KINDS[name]
    if kind is str:
        if not isinstance(value, str):
            raise StudioError(f"{name} must be text, not {value!r}.")
        return
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise StudioError(f"{name} must be a {'whole ' if kind is int else ''}number, not {value!r}.")
    if kind is float and not math.isfinite(value):
        raise StudioError(f"{name} must be a finite number.")
    if kind is int and value < (smallest := _SMALLEST.get(name, 0)):
        raise StudioError(f"{name} must be at least {smallest}, not {value}.")
    if name == "seed" and value > _LARGEST_SEED:
        raise StudioError(f"seed must be at most {_LARGEST_SEED}, not {value}.")


def _request(number, fields, base_seed, options):
    if ("prompt" in fields) == ("class_label" in fields):
        raise StudioError('say what to draw: a prompt such as "a red apple", or class_label for such a model.')
    if fields.get("decoding", options.get("decoding")) != options.get("decoding"):
        options = {name: value for name, value in options.items() if name not in _DECODING}  # none of this decoding's
    chosen = {**options, **fields}
    decoding = given(chosen.get("decoding"), **{name: chosen[name] for name in _DECODING if name in chosen})
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
