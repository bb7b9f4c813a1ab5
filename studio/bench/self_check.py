"""`studio doctor --check`: runs every bundled pipeline and decoding once and compares it with plain PyTorch on the CPU.

On the CPU in float32, three backends are compared: compiled C, packed weights and plain PyTorch. Random numbers come
from generators on the CPU, so that a device with the same numbers up to rounding generates the same tokens.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from studio import backends
from studio.checkpoints.bundled import BUNDLED
from studio.checkpoints.loading import load, pick_device
from studio.decoding.registry import DECODINGS, decodings_for
from studio.errors import StudioError

DTYPES = ("float32", "bfloat16")
PROMPT = "a red apple"
LEAST_AGREEMENT = 0.9
"""The least share of tokens that must equal those of plain PyTorch on the CPU, in float32."""
MOST_TEXT_ERROR = {"float32": 1e-3, "bfloat16": 0.1}
"""Of states of the text encoder, over the largest of them."""
MOST_PIXEL_ERROR = {"float32": 0.5, "bfloat16": 8.0}
"""Of the pixels of the same tokens, in grey levels of 255."""
_SAME = 1e-3
_SEED, _WINDOW = 0, 8


@dataclass
class Check:
    """One thing that was run.

    Attributes:
        model, part, dtype, backend: what; `part` is a decoding, "text" or "pixels".
        seconds: of the second run.
        memory_mb: most memory of the device that was allocated in it (CUDA), or of the process (CPU), in MiB.
        error: largest difference from plain PyTorch on the CPU, as of `MOST_TEXT_ERROR` or `MOST_PIXEL_ERROR`.
        agreement: share of tokens that equal those of plain PyTorch on the CPU; continuous ones up to 0.1 %.
        problem: why it failed; None where it is within the tolerances.
    """

    model: str
    part: str
    dtype: str
    backend: str
    seconds: float = 0.0
    memory_mb: float = 0.0
    error: float | None = None
    agreement: float | None = None
    problem: str | None = None


def self_check(device: str | None = None, models: Iterable[str] | None = None) -> Iterator[Check]:
    """Runs the checks, one after the other.

    Args:
        device: where to run; CUDA when there is one, else the CPU.
        models: names or folders of pipelines; all bundled ones when None.

    Raises:
        StudioError: a model that cannot be loaded, or a device that is not there.
    """
    chosen = pick_device(device)
    for name in models or [name for name, about in BUNDLED.items() if about.kind == "pipeline"]:
        expected = _Expected(load(name, device="cpu", dtype="float32"))
        for dtype in DTYPES:
            pipe = load(name, device=chosen, dtype=dtype)
            pipe.set_progress_bar_config(disable=True)
            for backend in _backends(chosen, dtype):
                with backends.using(backend):
                    yield from _checks(name, pipe, dtype, backend, expected)


def summary(checks: list[Check], device: str, seconds: float) -> str:
    """The last line of the report."""
    failed = sum(check.problem is not None for check in checks)
    if failed:
        return f"{failed} of {len(checks)} checks failed on {device}, in {seconds:.0f} s."
    return f"All {len(checks)} checks passed on {device}, in {seconds:.0f} s."


def as_row(check: Check) -> dict[str, Any]:
    """A check as a JSON object, with `ok`."""
    return {**asdict(check), "ok": check.problem is None}


def _backends(device: torch.device, dtype: str) -> tuple[str, ...]:
    if device.type == "cpu" and dtype == "float32":
        return ("native", "packed", "plain")
    return ("graphs", "plain") if device.type == "cuda" else ("plain",)


class _Expected:
    """What plain PyTorch gives on the CPU in float32."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)
        self.tokens: dict[str, torch.Tensor] = {}
        with backends.using("plain"):
            self.condition = _condition(pipe)
            for decoding in _decodings(pipe):
                self.tokens[decoding] = _run(pipe, decoding)
            self.shown = next(iter(self.tokens.values()))
            self.pixels = pipe.decode_tokens(self.shown, "pt")


def _checks(name: str, pipe: Any, dtype: str, backend: str, expected: _Expected) -> Iterator[Check]:
    if pipe.takes_text:
        check = Check(name, "text", dtype, backend)
        states = _measured(check, lambda: _condition(pipe))
        if states is not None:
            scale = expected.condition.abs().max()
            check.error = float((states - expected.condition).abs().max() / scale)
            _refuse_above(check, MOST_TEXT_ERROR[dtype])
        yield check
    check = Check(name, "pixels", dtype, backend)
    shown = expected.shown.to(pipe.transformer.device)
    pixels = _measured(check, lambda: pipe.decode_tokens(shown, "pt").float().cpu())
    if pixels is not None:
        check.error = float((pixels - expected.pixels).abs().max() * 255)
        _refuse_above(check, MOST_PIXEL_ERROR[dtype])
    yield check
    for decoding, wanted in expected.tokens.items():
        check = Check(name, decoding, dtype, backend)
        tokens = _measured(check, partial(_run, pipe, decoding))
        if tokens is not None:
            check.agreement = _agreement(tokens, wanted)
            if dtype == "float32" and check.agreement < LEAST_AGREEMENT:
                check.problem = f"{check.agreement:.0%} of the tokens agree, fewer than {LEAST_AGREEMENT:.0%}"
        yield check


def _refuse_above(check: Check, most: float) -> None:
    if check.error is None or not check.error <= most:  # not a number is refused too
        check.problem = f"the error is {check.error:.3g}, more than {most:g}"


def _measured(check: Check, work: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """The result of the second of two calls, with its time and memory; None where it fails, with the reason."""
    try:
        work()
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = work()
        check.seconds = time.perf_counter() - began
        check.memory_mb = (torch.cuda.max_memory_allocated() if cuda else _resident()) / 2**20
    except (RuntimeError, ValueError, StudioError) as error:  # torch reports everything about a device as RuntimeError
        check.problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None
    return result


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _decodings(pipe: Any) -> list[str]:
    parts = [name for name, part in pipe.components.items() if part is not None]
    return [name for name in decodings_for(type(pipe).__name__, parts) if name != "exact"]


def _subject(pipe: Any) -> dict[str, Any]:
    return {"prompt": PROMPT} if pipe.takes_text else {"class_labels": 0}


def _condition(pipe: Any) -> torch.Tensor:
    return pipe.encode_prompt(PROMPT)[0].float().cpu() if pipe.takes_text else torch.zeros(())


def _run(pipe: Any, decoding: str) -> torch.Tensor:
    """Tokens (1, ...) on the CPU; the image is decoded too, which refuses pixels that are not finite."""
    generator = torch.Generator().manual_seed(_SEED)
    output = pipe(**_subject(pipe), generator=generator, decoding=_settings(pipe, decoding), output_type="pt")
    return output.tokens.cpu()


def _settings(pipe: Any, decoding: str) -> Any:
    """The decoding with its defaults, but a window that need not be measured, and no more neighbours than codes."""
    choice = DECODINGS[decoding]
    given: dict[str, Any] = {}
    for option in choice.options:
        if option.name == "k":
            given["k"] = min(option.default, pipe.image_tokenizer.config.codebook_size - 1)
        if option.name == "window":
            given["window"] = _WINDOW
    return choice.settings(**given)


def _agreement(tokens: torch.Tensor, wanted: torch.Tensor) -> float:
    if tokens.shape != wanted.shape:
        return 0.0
    if not tokens.is_floating_point():
        return float((tokens == wanted).float().mean())
    close = (tokens.float() - wanted).abs() <= _SAME * wanted.abs().max()
    return float(close.float().mean())
