"""Load test of `studio serve`: whether each client gets its own images, throughput, latency and memory.

The server runs in a process of its own and is asked over the loopback as any program would ask it. Scope: the Generate
endpoint, one image a request.
"""

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image

from studio.checkpoints.loading import load
from studio.errors import StudioError

_SUBJECTS = ("a red apple", "a fox", "a rocket", "a rainbow", "an octopus", "a hot beverage", "a green book")
_GUIDANCE = (None, None, 2.0)  # of every third client another one, which is sampled in calls of its own
_LONGEST_START = 600  # seconds
_MIB = 2**20


@dataclass(frozen=True)
class Request:
    """What one client asks for: a prompt, a seed, and a guidance scale or `None`."""

    prompt: str
    seed: int
    guidance: float | None


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Args:
        image: (H, W, 3) uint8.
        record: the metadata in the PNG.
        seconds: latency.
        together: images sampled in the same call.
    """

    image: np.ndarray
    record: dict
    seconds: float
    together: int


def bench_serve(
    model: str | Path = "emoji-ar",
    *,
    clients: int = 50,
    requests: int = 2,
    max_batch: int = 8,
    device: str | torch.device | None = None,
) -> dict:
    """Query a server with `clients` concurrent clients, each `requests` times in a row, after a round of warm-up.

    Everything is sampled in float32, where an image of a batch equals that of a single call.

    Returns:
        A dict:

        - "requests", "answered", and "lost": no answer, or an error;
        - "mixed_up": the PNG says something else than was asked, or the image is nearer to that of another request;
        - "different": not what a single call samples; a colour is off by more than the one level of 255 that the
        rounding
          of a batch may cost;
        - "seconds" of all rounds, "images_per_second", "median_seconds" and "longest_seconds" of an answer;
        - "images_a_call", on average;
        - "memory_before_mib" and "memory_after_mib" of the server, around these rounds.

    Raises:
        StudioError: where the server does not start.
    """
    rounds = [_round(number, clients) for number in range(requests + 1)]
    command = ["--model", str(model), "--dtype", "float32", "--max-batch", str(max_batch), "--max-images", "1"]
    command += ["--max-waiting", str(max(64, clients)), "--max-per-user", str(clients)]  # all come from one address
    command += ["--devices", str(device)] if device else []
    with tempfile.TemporaryDirectory() as folder, _server(command, Path(folder)) as (url, process):
        with ThreadPoolExecutor(clients) as pool:
            asking = list(pool.map(lambda _: _client(url, folder), range(clients)))
            _ask(pool, asking, rounds[0])
            before, began = _memory(process), time.perf_counter()
            answers = [answer for each in rounds[1:] for answer in _ask(pool, asking, each)]
            seconds, after = time.perf_counter() - began, _memory(process)
            for client in asking:
                client.close()
    asked = [request for each in rounds[1:] for request in each]
    return {
        "model": str(model),
        "clients": clients,
        **compared(asked, answers, _alone(model, device, asked)),
        "seconds": seconds,
        "images_per_second": sum(answer is not None for answer in answers) / seconds,
        **_waits([answer for answer in answers if answer is not None]),
        "memory_before_mib": before / _MIB,
        "memory_after_mib": after / _MIB,
    }


def compared(asked: Sequence[Request], answers: Sequence[Answer | None], alone: Sequence[np.ndarray]) -> dict[str, int]:
    """Compare the answers with images sampled by single calls.

    Args:
        asked: the requests.
        answers: an `Answer` each, or `None`.
        alone: the images (H, W, 3) that single calls sample of them.
    """
    counts = {"requests": len(asked), "answered": 0, "lost": 0, "mixed_up": 0, "different": 0}
    expected = np.stack(alone).astype(np.float32)
    for number, (request, answer) in enumerate(zip(asked, answers)):
        if answer is None:
            counts["lost"] += 1
            continue
        counts["answered"] += 1
        off = np.abs(expected - answer.image)
        distances = off.mean(axis=(1, 2, 3))
        is_own = _says(answer.record, request) and distances[number] == distances.min()
        counts["mixed_up"] += not is_own
        counts["different"] += bool(off[number].max() > 1)
    return counts


def _says(record, request):
    call = record["call"]
    found = Request(call["prompt"], record["seed"], call.get("guidance_scale"))
    return found == request


def _round(number, clients):
    """What every client asks for in a round; no two requests of a run are equal."""
    return [
        Request(_SUBJECTS[client % len(_SUBJECTS)], number * clients + client, _GUIDANCE[client % len(_GUIDANCE)])
        for client in range(clients)
    ]


def _ask(pool, asking, requests):
    """The answers to one request of every client, all asked at the same moment."""
    ready = threading.Barrier(len(asking))

    def ask(client, request):
        ready.wait()
        began = time.perf_counter()
        try:
            values = {"prompt": request.prompt, "count": 1, "seed": request.seed, "guidance": request.guidance}
            [found], details = client.predict(**values, api_name="/generate")
            with Image.open(found["image"]) as file:
                image, record = np.asarray(file.convert("RGB")), json.loads(file.info["studio"])
        except Exception:
            return None
        return Answer(image, record, time.perf_counter() - began, details["sampled_together"])

    return list(pool.map(ask, asking, requests))


def _alone(model, device, requests):
    """The images of single calls."""
    pipe = load(model, device=device, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    images = []
    for request in requests:
        generator = torch.Generator().manual_seed(request.seed)
        output = pipe(request.prompt, guidance_scale=request.guidance, generator=generator)
        images.append(np.asarray(output.images[0]))
    return images


def _waits(answers):
    if not answers:
        return {"median_seconds": None, "longest_seconds": None, "images_a_call": None}
    seconds = [answer.seconds for answer in answers]
    return {
        "median_seconds": float(np.median(seconds)),
        "longest_seconds": max(seconds),
        "images_a_call": len(answers) / sum(1 / answer.together for answer in answers),
    }


def _client(url, folder):
    from gradio_client import Client

    return Client(url, verbose=False, download_files=folder, analytics_enabled=False)


def _memory(process):
    """Resident bytes of the server."""
    import psutil

    return psutil.Process(process.pid).memory_info().rss


@contextmanager
def _server(command, folder):
    """A server in a process of its own: its address and its `Popen`."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "studio", "serve", "--port", str(port), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}/"
        _await(url, process, log)
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(url, process, log):
    deadline = time.monotonic() + _LONGEST_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise StudioError(f"The server did not start: {said[-1].removeprefix('Error: ')}")
        try:
            with urlopen(f"{url}config", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise StudioError(f"The server did not answer within {_LONGEST_START} seconds.")
