"""Load test of `studio serve`: whether each client gets its own images, throughput, latency and memory.

The server runs in a process of its own and is asked over the loopback as any client of its API would ask it, once with
continuous batching and once with the rule that only equal requests share a call, which is the reference.
"""

import base64
import io
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from studio.checkpoints.loading import load
from studio.checks import check_integer
from studio.errors import StudioError

_SUBJECTS = ("a red apple", "a fox", "a rocket", "a rainbow", "an octopus", "a hot beverage", "a green book")
_MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"guidance_scale": 2.0},
    {"temperature": 0.9, "top_k": 100},
    {"guidance_scale": 5.0, "top_p": 0.9},
    {"guidance_scale": 1.0},
    {"temperature": 0.5},
    {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 500, "top_p": 0.95},
)
_STREAMS = 4  # one client in so many asks for a stream with a partial image
_HANGS_UP = 9  # in a mixed test, one request in so many is given up halfway and asked again
_PATIENCE = 0.05  # seconds after which it is given up
_LONGEST_START, _LONGEST_ANSWER = 600, 600  # seconds
_MIB = 2**20
MAX_REQUESTS = 100_000


@dataclass(frozen=True)
class Request:
    """What one client asks for.

    Args:
        prompt: the text.
        seed: of the first image.
        count: images.
        settings: guidance, temperature and filters, as arguments of the pipeline.
    """

    prompt: str
    seed: int
    count: int = 1
    settings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Args:
        images: (H, W, 3) uint8 each.
        records: the metadata in their PNGs.
        seconds: latency.
        first_partial: seconds until the first partial image of a stream; else `None`.
    """

    images: list[np.ndarray]
    records: list[dict]
    seconds: float
    first_partial: float | None = None


def bench_serve(
    model: str | Path = "emoji-ar",
    *,
    clients: int = 50,
    requests: int = 2,
    max_batch: int = 8,
    mixed: bool = False,
    device: str | torch.device | None = None,
) -> dict:
    """Query servers with `clients` concurrent clients, each `requests` times in a row, after a round of warm-up.

    Everything is sampled in float32, where an image of a batch equals that of a single call.

    Args:
        model: a bundled name or a folder.
        clients: clients, all at the same address.
        requests: of each client, one after the other.
        max_batch: as of `studio serve`.
        mixed: whether guidance, temperature, filters and numbers of images differ, and some requests are given up
            halfway and asked again.
        device: as of `studio.load`.

    Returns:
        A dict:

        - "images_per_second"; "p50_seconds" and "p95_seconds" of an answer; "time_to_first_partial", the median in
          seconds; "batch_mean", images in a call of the transformer; "reference_images_per_second" and
          "reference_p95_seconds", of the reference;
        - "requests", "answered", and "lost": no answer, or an error;
        - "mixed_up": the PNG says something else than was asked, or the image is nearer to that of another request;
        - "different": not what a single call samples; a colour is off by more than the one level of 255 that the
          rounding of a batch may cost;
        - "memory_before_mib" and "memory_after_mib" of the server, around these rounds.

    Raises:
        StudioError: where a server does not start.
    """
    clients, requests = check_integer("clients", clients, 1, 1000), check_integer("requests", requests, 1)
    check_integer("clients times requests", clients * requests, 1, MAX_REQUESTS)
    check_integer("max_batch", max_batch, 1, 1024)
    rounds = [_round(number, clients, mixed) for number in range(requests + 1)]
    command = ["--model", str(model), "--dtype", "float32", "--max-batch", str(max_batch)]
    command += ["--max-images", str(min(2, max_batch)), "--max-waiting", str(max(64, 2 * clients))]
    command += ["--max-per-user", str(2 * clients)]  # all come from one address
    command += ["--devices", str(device)] if device else []
    found = _measured([*command, "--batching", "continuous"], rounds, mixed)
    reference = _measured([*command, "--batching", "equal"], rounds, mixed)
    asked = [request for each in rounds[1:] for request in each]
    answers = found.pop("answers")
    return {
        "model": str(model),
        "clients": clients,
        **found,
        "reference_images_per_second": reference["images_per_second"],
        "reference_p95_seconds": reference["p95_seconds"],
        **compared(asked, answers, _alone(model, device, asked)),
    }


def compared(
    asked: Sequence[Request], answers: Sequence[Answer | None], alone: Sequence[list[np.ndarray]]
) -> dict[str, int]:
    """Compare the answers with images sampled by single calls.

    Args:
        asked: the requests.
        answers: an `Answer` each, or `None`.
        alone: the images (H, W, 3) that single calls sample of them.
    """
    counts = {"requests": len(asked), "answered": 0, "lost": 0, "mixed_up": 0, "different": 0}
    expected = np.stack([image for images in alone for image in images]).astype(np.float32)
    owners = [number for number, images in enumerate(alone) for _ in images]
    for number, (request, answer) in enumerate(zip(asked, answers)):
        if answer is None or len(answer.images) != request.count:
            counts["lost"] += 1
            continue
        counts["answered"] += 1
        own = np.flatnonzero(np.asarray(owners) == number)
        is_own = all(_says(record, request, place) for place, record in enumerate(answer.records))
        is_different = False
        for place, image in zip(own, answer.images):
            off = np.abs(expected - image)
            distances = off.mean(axis=(1, 2, 3))
            is_own &= bool(distances[place] == distances.min())
            is_different |= bool(off[place].max() > 1)
        counts["mixed_up"] += not is_own
        counts["different"] += is_different
    return counts


def _says(record: dict, request: Request, place: int) -> bool:
    call = record["call"]
    settings = {name: call[name] for name in ("guidance_scale", "temperature", "top_k", "top_p") if name in call}
    found = Request(call["prompt"], record["seed"] - place, call.get("num_images", request.count), settings)
    return found == request


def _round(number: int, clients: int, mixed: bool) -> list[Request]:
    """What every client asks for in a round; no two requests of a run are equal."""
    return [
        Request(
            _SUBJECTS[client % len(_SUBJECTS)],
            2 * (number * clients + client),
            1 + (client % 5 == 2 if mixed else 0),
            dict(_MIXED[(client + number) % len(_MIXED)]) if mixed else {},
        )
        for client in range(clients)
    ]


def _measured(command: list[str], rounds: list[list[Request]], mixed: bool) -> dict[str, Any]:
    """What a server with these options does in all rounds but the first."""
    clients = len(rounds[0])
    with tempfile.TemporaryDirectory() as folder, _server(command, Path(folder)) as (url, process):
        with (
            ThreadPoolExecutor(clients) as pool,
            httpx.Client(base_url=url, timeout=_LONGEST_ANSWER, limits=httpx.Limits(max_connections=None)) as http,
        ):
            _ask(pool, http, rounds[:1], False)
            before, counted, began = _memory(process), _batches(http), time.perf_counter()
            answers = _ask(pool, http, rounds[1:], mixed)
            seconds, after = time.perf_counter() - began, _memory(process)
            images, calls = (new - old for new, old in zip(_batches(http), counted))
    given = [answer for answer in answers if answer is not None]
    latencies = [answer.seconds for answer in given] or [float("nan")]
    partials = [answer.first_partial for answer in given if answer.first_partial is not None]
    return {
        "images_per_second": sum(len(answer.images) for answer in given) / seconds,
        "p50_seconds": float(np.median(latencies)),
        "p95_seconds": float(np.quantile(latencies, 0.95)),
        "time_to_first_partial": float(np.median(partials)) if partials else None,
        "batch_mean": images / calls if calls else None,
        "memory_before_mib": before / _MIB,
        "memory_after_mib": after / _MIB,
        "answers": answers,
    }


def _ask(
    pool: ThreadPoolExecutor, http: httpx.Client, rounds: Sequence[Sequence[Request]], hangs_up: bool
) -> list[Answer | None]:
    """The answers to all requests, round after round; each client asks its own one after the other."""
    clients = len(rounds[0])
    ready = threading.Barrier(clients)

    def ask_all(client: int) -> list[Answer | None]:
        ready.wait()
        return [
            _ask_one(http, each[client], client % _STREAMS == 0, hangs_up and (client + number) % _HANGS_UP == 0)
            for number, each in enumerate(rounds)
        ]

    by_client = list(pool.map(ask_all, range(clients)))
    return [answers[number] for number in range(len(rounds)) for answers in by_client]


def _ask_one(http: httpx.Client, request: Request, streams: bool, hangs_up: bool) -> Answer | None:
    body = {"prompt": request.prompt, "seed": request.seed, "n": request.count, **request.settings}
    body |= {"stream": True, "partial_images": 1} if streams else {}
    if hangs_up:
        with suppress(httpx.TimeoutException):
            http.post("v1/images/generations", json={**body, "stream": False, "partial_images": 0}, timeout=_PATIENCE)
    began, first, images = time.perf_counter(), None, []
    try:
        with http.stream("POST", "v1/images/generations", json=body) as answer:
            answer.raise_for_status()
            for kind, data in _images_of(answer, streams):
                if kind == "partial":
                    first = first or time.perf_counter() - began
                else:
                    images.append(data)
    except (httpx.HTTPError, ValueError, KeyError):
        return None
    seconds = time.perf_counter() - began
    opened = [Image.open(io.BytesIO(base64.b64decode(data))) for data in images]
    records = [json.loads(image.info["studio"]) for image in opened]
    return Answer([np.asarray(image.convert("RGB")) for image in opened], records, seconds, first)


def _images_of(answer: httpx.Response, streams: bool) -> Iterator[tuple[str, str]]:
    """The images of an answer, as base64, each with "partial" or "whole"."""
    if not streams:
        answer.read()
        yield from (("whole", each["b64_json"]) for each in answer.json()["data"])
        return
    for line in answer.iter_lines():
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            yield "partial" if event["type"].endswith("partial_image") else "whole", event["b64_json"]


def _alone(model: str | Path, device: Any, requests: Sequence[Request]) -> list[list[np.ndarray]]:
    """The images of single calls."""
    pipe = load(model, device=device, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return [
        [
            np.asarray(
                pipe(
                    request.prompt, generator=torch.Generator().manual_seed(request.seed + place), **request.settings
                ).images[0]
            )
            for place in range(request.count)
        ]
        for request in requests
    ]


def _batches(http: httpx.Client) -> tuple[float, float]:
    """Images in all calls so far, and the number of calls."""
    found = dict(re.findall(r"^studio_batch_images_(\w+) (\S+)$", http.get("metrics").text, re.M))
    return float(found["sum"]), float(found["count"])


def _memory(process: subprocess.Popen) -> int:
    """Resident bytes of the server."""
    import psutil

    return psutil.Process(process.pid).memory_info().rss


@contextmanager
def _server(command: list[str], folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
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


def _await(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _LONGEST_START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise StudioError(f"The server did not start: {said[-1].removeprefix('Error: ')}")
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise StudioError(f"The server did not answer within {_LONGEST_START} seconds.")
