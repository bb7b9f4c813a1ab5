"""Clients of `studio serve`, which runs in a process of its own and is asked over the loopback as any client asks."""

import base64
import inspect
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
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
_LONGEST_START, LONGEST_ANSWER = 600, 600  # seconds
MIB = 2**20
GENERATIONS, EDITS, CHAT = "v1/images/generations", "v1/images/edits", "v1/chat/completions"


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


@dataclass(frozen=True)
class Refusal:
    """An error that says what to do, in the form of OpenAI's API.

    Args:
        status: of HTTP; 200 for a stream that ended with the error.
        message: the sentence.
    """

    status: int
    message: str


Outcome = Answer | Refusal | None
"""What came of a request; `None`: nothing, or something else than an answer or a clear error."""


def settings_of(model: str | Path, device: Any) -> Collection[str]:
    """The arguments that a call of the model's pipeline takes."""
    return inspect.signature(type(load(model, device=device)).__call__).parameters


def round_of(number: int, clients: int, mixed: bool, known: Collection[str] | None = None) -> list[Request]:
    """What every client asks for in a round; no two requests of a run are equal.

    Args:
        number: of the round.
        clients: how many requests.
        mixed: whether guidance, temperature, filters and numbers of images differ.
        known: settings that the model takes, others are left out; None: all.
    """

    def settings(client: int) -> dict[str, Any]:
        chosen = _MIXED[(client + number) % len(_MIXED)] if mixed else {}
        return {name: value for name, value in chosen.items() if known is None or name in known}

    return [
        Request(
            _SUBJECTS[client % len(_SUBJECTS)],
            2 * (number * clients + client),
            1 + (client % 5 == 2 if mixed else 0),
            settings(client),
        )
        for client in range(clients)
    ]


def compared(asked: Sequence[Request], answers: Sequence[Outcome], alone: Sequence[list[np.ndarray]]) -> dict[str, int]:
    """Compare the answers with images sampled by single calls.

    Args:
        asked: the requests.
        answers: what came of each.
        alone: the images (H, W, 3) that single calls sample of them.
    """
    counts = {"requests": len(asked), "answered": 0, "refused": 0, "lost": 0, "mixed_up": 0, "different": 0}
    expected = np.stack([image for images in alone for image in images]).astype(np.float32)
    owners = [number for number, images in enumerate(alone) for _ in images]
    for number, (request, answer) in enumerate(zip(asked, answers)):
        if not isinstance(answer, Answer) or len(answer.images) != request.count:
            counts["refused" if isinstance(answer, Refusal) else "lost"] += 1
            continue
        counts["answered"] += 1
        own = np.flatnonzero(np.asarray(owners) == number)
        is_own = all(says(record, request, place) for place, record in enumerate(answer.records))
        is_different = False
        for place, image in zip(own, answer.images):
            off = np.abs(expected - image)
            distances = off.mean(axis=(1, 2, 3))
            is_own &= bool(distances[place] == distances.min())
            is_different |= bool(off[place].max() > 1)
        counts["mixed_up"] += not is_own
        counts["different"] += is_different
    return counts


def says(record: dict, request: Request, place: int) -> bool:
    """Whether the metadata of an image are those of this place of a request."""
    call = record["call"]
    settings = {name: call[name] for name in ("guidance_scale", "temperature", "top_k", "top_p") if name in call}
    found = Request(call["prompt"], record["seed"] - place, call.get("num_images", request.count), settings)
    return found == request


def ask_all(
    pool: ThreadPoolExecutor, http: httpx.Client, rounds: Sequence[Sequence[Request]], hangs_up: bool
) -> list[Outcome]:
    """The answers to all requests, round after round; each client asks its own one after the other."""
    clients = len(rounds[0])
    ready = threading.Barrier(clients)

    def ask_in_turn(client: int) -> list[Outcome]:
        ready.wait()
        return [
            ask(http, each[client], client % _STREAMS == 0, hangs_up and (client + number) % _HANGS_UP == 0)
            for number, each in enumerate(rounds)
        ]

    by_client = list(pool.map(ask_in_turn, range(clients)))
    return [answers[number] for number in range(len(rounds)) for answers in by_client]


def ask(http: httpx.Client, request: Request, streams: bool = False, hangs_up: bool = False) -> Outcome:
    """Ask for images.

    Args:
        http: with the address of the server.
        request: what to ask for.
        streams: whether to ask for a stream with a partial image.
        hangs_up: whether to ask, give up, and ask again.
    """
    body = {"prompt": request.prompt, "seed": request.seed, "n": request.count, **request.settings}
    body |= {"stream": True, "partial_images": 1} if streams else {}
    if hangs_up:
        with suppress(httpx.TimeoutException):
            http.post(GENERATIONS, json={**body, "stream": False, "partial_images": 0}, timeout=_PATIENCE)
    return outcome_of(http, GENERATIONS, streams, json=body)


def outcome_of(http: httpx.Client, path: str, streams: bool = False, **form: Any) -> Outcome:
    """What comes of a request for images; `form` is its body, as of `httpx`."""
    began, first, images = time.perf_counter(), None, []
    try:
        with http.stream("POST", path, **form) as answer:
            if answer.is_error:
                answer.read()
                return Refusal(answer.status_code, answer.json()["error"]["message"])
            for kind, data in _images_of(answer, streams):
                if kind == "error":
                    return Refusal(200, data)
                if kind == "partial":
                    first = first or time.perf_counter() - began
                else:
                    images.append(data)
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    seconds = time.perf_counter() - began
    opened = [Image.open(io.BytesIO(base64.b64decode(data))) for data in images]
    records = [json.loads(image.info["studio"]) for image in opened]
    return Answer([np.asarray(image.convert("RGB")) for image in opened], records, seconds, first)


def _images_of(answer: httpx.Response, streams: bool) -> Iterator[tuple[str, str]]:
    """The images of an answer, as base64, each with "partial" or "whole"; or an "error" and its message."""
    if not streams:
        answer.read()
        yield from (("whole", each["b64_json"]) for each in answer.json()["data"])
        return
    for line in answer.iter_lines():
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                yield "error", event["error"]["message"]
                return
            yield "partial" if event["type"].endswith("partial_image") else "whole", event["b64_json"]


def sampled_alone(model: str | Path, device: Any, requests: Sequence[Request]) -> list[list[np.ndarray]]:
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


def batches(http: httpx.Client) -> tuple[float, float]:
    """Images in all calls so far, and the number of calls."""
    return number(http, "studio_batch_images_sum"), number(http, "studio_batch_images_count")


def number(http: httpx.Client, name: str) -> float:
    """A number of /metrics, with its labels if it has any; 0 where it is missing."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", http.get("metrics").text, re.M)
    return float(found[1]) if found else 0.0


def memory_of(process: subprocess.Popen) -> int:
    """Resident bytes of the server."""
    import psutil

    return psutil.Process(process.pid).memory_info().rss


@contextmanager
def running_server(command: list[str], folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
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
            process.wait(timeout=60)
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
