"""What other processes on the machine cost: one image with idle cores, and with a busy loop on each of them."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from studio.bench.models import load_generator
from studio.errors import StudioError
from studio.pipelines.base import ConditionalPipeline

_PROMPT = "a red apple"
_BUSY = "print(flush=True)\nwhile True: pass"


def bench_contention(model: str = "emoji-ar", *, rounds: int = 5, images: int = 5) -> dict[str, float]:
    """Times one image on the CPU, in turns on the machine as it is and beside one busy process for each core.

    Args:
        model: a bundled name or folder of a text-conditional pipeline.
        rounds: how often both are measured.
        images: images of a round, one after the other.

    Returns:
        `{"idle_seconds", "busy_seconds", "ratio"}`: the medians over all images, and busy over idle.

    Raises:
        StudioError: another kind of model, or fewer than one round or image.
    """
    if min(rounds, images) < 1:
        raise StudioError(f"Measure at least one round of one image, not {rounds} of {images}.")
    pipe = load_generator(model, "cpu", ConditionalPipeline)
    idle, busy = [], []

    def sample():
        pipe(_PROMPT)

    sample()
    for _ in range(rounds):
        idle += [_seconds(sample) for _ in range(images)]
        with _busy_cores():
            busy += [_seconds(sample) for _ in range(images)]
    seconds = {"idle_seconds": statistics.median(idle), "busy_seconds": statistics.median(busy)}
    return {**seconds, "ratio": seconds["busy_seconds"] / seconds["idle_seconds"]}


def _seconds(sample: Callable[[], None]) -> float:
    began = time.perf_counter()
    sample()
    return time.perf_counter() - began


@contextmanager
def _busy_cores() -> Iterator[None]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = []
    try:
        for _ in range(cores):
            processes.append(subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()
