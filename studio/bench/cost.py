"""What a call of a network for several positions costs, and so what speculation must bring to pay on this machine.

What limits a decoding with drafts: the price of a call that reads a tree, and the bounds of the machine.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch

from studio import backends
from studio.bench.models import check_fits
from studio.checkpoints.loading import load, pick_device
from studio.checks import check_integer, check_number, shown
from studio.decoding.trees import MAX_NODES, path_call
from studio.decoding.windows import TOKENS_A_CALL
from studio.errors import StudioError
from studio.models.llamagen import LlamaGen
from studio.pipelines.llamagen import LlamaGenPipeline

_IN_A_ROW = 4


def call_seconds(model: LlamaGen, rows: int, nodes: int, repeats: int = 9) -> float:
    """Median seconds of one call for a path of n nodes in each of some rows, logits included, half down an image."""
    call = path_call(model, rows, nodes)
    return statistics.median([backends.timed(call, model.device)[0] for _ in range(repeats + 2)][2:])


def least_call_seconds(
    model: LlamaGen, rows: int, sizes: Sequence[int], seconds: float = 5.0, repeats: int = 3
) -> dict[int, float]:
    """The same for several numbers of nodes, measured in turns: the least seconds of each.

    Args:
        model: the model, whose fastest view runs.
        rows: sequences of a call; two for one guided image.
        sizes: numbers of nodes.
        seconds: how long to measure in all, at least.
        repeats: rounds over all sizes, at least; in each, a size is called several times, as decoding does.
    """
    calls = {nodes: path_call(model, rows, nodes) for nodes in sizes}
    least = {nodes: float("inf") for nodes in sizes}
    for call in calls.values():
        backends.timed(call, model.device)[0]
    began, rounds = time.perf_counter(), 0
    while rounds < repeats or time.perf_counter() - began < seconds:
        for nodes, call in calls.items():
            least[nodes] = min(least[nodes], *(backends.timed(call, model.device)[0] for _ in range(_IN_A_ROW)))
        rounds += 1
    return least


def peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations a second of a square matrix product, at best."""
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(backends.timed(lambda: left @ right, device)[0] for _ in range(repeats))


POSITIONS = (1, 2, 4, 8, 16, 32, 64)
MAX_THREADS = 1024
PRESETS = {"llamagen-b": "B", "llamagen-l": "L", "llamagen-xl": "XL", "llamagen-3b": "3B"}
_GUIDED = 2


def bench_cost(
    model: str = "emoji-ar",
    *,
    preset: str | None = None,
    positions: Sequence[int] = POSITIONS,
    threads: Sequence[int] = (1, 2),
    seconds: float = 5.0,
    device: str | None = None,
) -> dict:
    """Times calls for one guided image (two sequences), half down it, logits included; the least of many counts.

    Args:
        model: a bundled name or folder of a pipeline with a `LlamaGen`.
        preset: a name of `PRESETS` instead: random weights of that published size, 256 tokens of an image.
        positions: numbers of positions of a call; 1, a step, is added.
        threads: numbers of threads; on a CPU only.
        seconds: how long to measure for each number of threads.
        device: where it runs; CUDA where there is one when `None`.

    Returns:
        `{"model", "device", "dtype", "sequences", "rows"}`. A row has "positions", "seconds", "break_even_tokens", the
        steps that take as long (a call that yields fewer tokens is slower than plain decoding), "peak_share", its
        products' operations a second over those of a large square product, and on a CPU "threads". Where a step has
        much of the peak already, no call for several positions can be cheaper than its steps. Rows of a window that was
        measured on a model of 64 tokens also have "jacobi_tokens", what Jacobi decoding yields a call there, and
        "jacobi_speedup", what that would give here.

    Raises:
        StudioError: an unknown preset, one that does not fit into memory, another kind of model, or a number out of
            range.
    """
    positions = sorted({1, *(check_integer("Each of positions", each, 1, MAX_NODES) for each in positions)})
    threads = [check_integer("Each of threads", each, 1, MAX_THREADS) for each in threads]
    seconds = check_number("seconds", seconds, 0, 3600)
    network = _loaded(model, device) if preset is None else _random(preset, pick_device(device))
    on_cpu = network.device.type == "cpu"
    rows: list[dict] = []
    for count in threads if on_cpu else [None]:
        with _threads(count):
            least = least_call_seconds(network, _GUIDED, positions, seconds)
            peak = peak_flops(network.device, network.dtype)
        for number in positions:
            row: dict[str, Any] = {"threads": count} if on_cpu else {}
            row |= {"positions": number, "seconds": least[number]}
            row |= {"break_even_tokens": least[number] / least[1]}
            row |= {"peak_share": _GUIDED * number * _operations(network) / least[number] / peak}
            if number > 1 and (tokens := TOKENS_A_CALL.get(number)):
                row |= {"jacobi_tokens": tokens, "jacobi_speedup": tokens / row["break_even_tokens"]}
            rows.append(row)
    dtype = str(network.dtype).removeprefix("torch.")
    name = model if preset is None else preset
    return {"model": name, "device": network.device.type, "dtype": dtype, "sequences": _GUIDED, "rows": rows}


def _operations(network: LlamaGen) -> int:
    """Floating-point operations of all matrix products for one position, attention left out."""
    matrices = [weight for weight in network.layers.parameters() if weight.dim() == 2]
    return 2 * sum(weight.numel() for weight in [*matrices, network.output.weight])


def _loaded(model: str, device: str | None) -> LlamaGen:
    pipe = load(model, device=device)
    if not isinstance(pipe, LlamaGenPipeline):
        raise StudioError(f"{model} has no LlamaGen whose calls could be timed: name emoji-ar, or give a --preset.")
    return pipe.transformer


def _random(preset: str, device: torch.device) -> LlamaGen:
    """Random weights; their values change no time."""
    if preset not in PRESETS:
        raise StudioError(f"There is no preset {shown(preset)}: choose one of {', '.join(PRESETS)}.")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        network = LlamaGen.preset(PRESETS[preset])
    # A view of the model for a CPU may hold a second copy of the weights.
    copies = 2 if device.type == "cpu" else 1
    needed = copies * dtype.itemsize * sum(weight.numel() for weight in network.parameters())
    check_fits(preset, needed, device)
    network = network.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(0.01) if weight.dim() == 1 else weight.uniform_(-0.05, 0.05)
    return network


@contextmanager
def _threads(count: int | None):
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
