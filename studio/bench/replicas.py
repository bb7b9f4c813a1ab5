"""What clients of `studio serve --ray` see when one of its replicas is killed while it works."""

import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from studio.bench.load import (
    GENERATIONS,
    LONGEST_ANSWER,
    Answer,
    Refusal,
    ask_all,
    compared,
    number,
    round_of,
    running_server,
    sampled_alone,
    settings_of,
)
from studio.checks import check_integer

_ANSWERED = f'studio_requests_total{{endpoint="/{GENERATIONS}",status="200"}}'
_PROCESS = "ray::ServeReplica:"  # how the processes of Ray Serve are called
_LONGEST_RETURN = 180  # seconds in which a killed replica must be replaced


def bench_replicas(
    model: str | Path = "emoji-ar",
    *,
    replicas: int = 2,
    clients: int = 8,
    requests: int = 8,
    max_batch: int = 8,
    device: str | torch.device | None = None,
) -> dict:
    """Ask a server with replicas, and kill one of them after a quarter of the requests.

    Args:
        model: a bundled name or a folder.
        replicas: at least 2.
        clients: concurrent clients.
        requests: of each client, one after the other, after one for warming up.
        max_batch, device: as of `studio serve`; a device is "cpu" or "cuda".

    Returns:
        A dict:

        - "requests", "answered", "refused", "lost", "mixed_up" and "different", as of `bench_serve`;
        - "twice": requests that the server answered more often than its clients got answers;
        - "retried": requests that were asked again of another replica;
        - "killed_after", answers until then, and "seconds_until_replaced": `None` if that did not happen;
        - "images_per_second", "p50_seconds" and "p95_seconds".

    Raises:
        StudioError: where the server does not start, as without Ray.
    """
    replicas = check_integer("replicas", replicas, 2, 64)
    clients, requests = check_integer("clients", clients, 1, 1000), check_integer("requests", requests, 1, 1000)
    known = settings_of(model, device)
    rounds = [round_of(number, clients, True, known) for number in range(requests + 1)]
    command = ["--ray", "--replicas", str(replicas), "--model", str(model), "--dtype", "float32"]
    command += ["--max-batch", str(max_batch), "--max-images", "2", "--max-waiting", str(max(64, 2 * clients))]
    command += ["--max-per-user", str(2 * clients), *(["--devices", str(device)] if device else [])]
    with tempfile.TemporaryDirectory() as folder, running_server(command, Path(folder)) as (url, process):
        with (
            ThreadPoolExecutor(clients) as pool,
            httpx.Client(base_url=url, timeout=LONGEST_ANSWER, limits=httpx.Limits(max_connections=None)) as http,
        ):
            ask_all(pool, http, rounds[:1], False)
            before, retried, began = number(http, _ANSWERED), number(http, "studio_retries_total"), time.perf_counter()
            killing = _Killing(http, process, replicas, before + clients * requests // 4)
            answers = ask_all(pool, http, rounds[1:], False)
            seconds = time.perf_counter() - began
            killing.join()
            sent, retried = number(http, _ANSWERED) - before, number(http, "studio_retries_total") - retried
    asked = [request for each in rounds[1:] for request in each]
    given = [answer for answer in answers if isinstance(answer, Answer)]
    broken = sum(isinstance(answer, Refusal) and answer.status == 200 for answer in answers)
    latencies = [answer.seconds for answer in given] or [float("nan")]
    return {
        "model": str(model),
        "replicas": replicas,
        "clients": clients,
        **compared(asked, answers, sampled_alone(model, device, asked)),
        "twice": int(sent) - len(given) - broken,
        "retried": int(retried),
        "killed_after": int(killing.answered - before),
        "seconds_until_replaced": killing.seconds,
        "images_per_second": sum(len(answer.images) for answer in given) / seconds,
        "p50_seconds": float(np.median(latencies)),
        "p95_seconds": float(np.quantile(latencies, 0.95)),
    }


class _Killing(threading.Thread):
    """Kills a replica once so many answers were given, and waits until there are as many as before."""

    def __init__(self, http: httpx.Client, process: subprocess.Popen, replicas: int, answers: float) -> None:
        super().__init__(daemon=True)
        self._http, self._process, self._replicas, self._answers = http, process, replicas, answers
        self.answered = 0.0
        self.seconds: float | None = None
        self.start()

    def run(self) -> None:
        while (answered := number(self._http, _ANSWERED)) < self._answers:
            time.sleep(0.1)
        first, *rest = self._there()
        self.answered, began = answered, time.monotonic()
        first.send_signal(signal.SIGKILL)
        while time.monotonic() - began < _LONGEST_RETURN:
            if len([each for each in self._there() if each.pid != first.pid]) == len(rest) + 1:
                self.seconds = time.monotonic() - began
                return
            time.sleep(0.2)

    def _there(self) -> list[Any]:
        """The processes of replicas of models."""
        import psutil

        found = []
        for each in psutil.Process(self._process.pid).children(recursive=True):
            try:
                title = " ".join(each.cmdline())
            except psutil.Error:
                continue
            if title.startswith(_PROCESS) and ":entry" not in title:
                found.append(each)
        return found
