"""Load test of `studio serve`: whether each client gets its own images, throughput, latency and memory.

Servers are asked once with continuous batching and once with the rule that only equal requests share a call, which is
the reference.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from studio.bench.load import (
    LONGEST_ANSWER,
    MIB,
    Answer,
    Request,
    ask_all,
    batches,
    compared,
    memory_of,
    round_of,
    running_server,
    sampled_alone,
    settings_of,
)
from studio.checks import check_integer

MAX_REQUESTS = 100_000


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
        - "requests", "answered", "refused": an error that says what to do, and "lost": anything else;
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
    known = settings_of(model, device)
    rounds = [round_of(number, clients, mixed, known) for number in range(requests + 1)]
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
        **compared(asked, answers, sampled_alone(model, device, asked)),
    }


def _measured(command: list[str], rounds: list[list[Request]], mixed: bool) -> dict[str, Any]:
    """What a server with these options does in all rounds but the first."""
    clients = len(rounds[0])
    with tempfile.TemporaryDirectory() as folder, running_server(command, Path(folder)) as (url, process):
        with (
            ThreadPoolExecutor(clients) as pool,
            httpx.Client(base_url=url, timeout=LONGEST_ANSWER, limits=httpx.Limits(max_connections=None)) as http,
        ):
            ask_all(pool, http, rounds[:1], False)
            before, counted, began = memory_of(process), batches(http), time.perf_counter()
            answers = ask_all(pool, http, rounds[1:], mixed)
            seconds, after = time.perf_counter() - began, memory_of(process)
            images, calls = (new - old for new, old in zip(batches(http), counted))
    given = [answer for answer in answers if isinstance(answer, Answer)]
    latencies = [answer.seconds for answer in given] or [float("nan")]
    partials = [answer.first_partial for answer in given if answer.first_partial is not None]
    return {
        "images_per_second": sum(len(answer.images) for answer in given) / seconds,
        "p50_seconds": float(np.median(latencies)),
        "p95_seconds": float(np.quantile(latencies, 0.95)),
        "time_to_first_partial": float(np.median(partials)) if partials else None,
        "batch_mean": images / calls if calls else None,
        "memory_before_mib": before / MIB,
        "memory_after_mib": after / MIB,
        "answers": answers,
    }
