"""Minutes of mixed requests to `studio serve`: generations, streams, edits, questions, and clients that leave."""

import base64
import io
import random
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from studio.bench.load import (
    CHAT,
    EDITS,
    LONGEST_ANSWER,
    MIB,
    Answer,
    Outcome,
    Refusal,
    Request,
    ask,
    memory_of,
    number,
    outcome_of,
    round_of,
    running_server,
    sampled_alone,
    says,
    settings_of,
)
from studio.checkpoints.loading import load
from studio.checks import check_integer, check_number

_READER, _QUESTION, _LENGTH = "emoji-vlm", "Is there a red apple?", 16
_GENERATIONS, _OTHERS = 32, 8  # different requests
_SAMPLES = 2  # seconds between two looks at the memory
_LONGEST_QUIET = 10  # seconds after which nothing may wait or run any more


@dataclass(frozen=True)
class Expected:
    """A request of the soak and what a single call answers.

    Args:
        kind: "generation", "edit" or "question".
        request: of images; the image of a question is what a generation of its seed gives.
        images: (H, W, 3) uint8 each: what is sampled, or edited into, or asked about.
        answer: to the question.
        original: the image that is edited.
    """

    kind: str
    request: Request
    images: list[np.ndarray]
    answer: str = ""
    original: np.ndarray | None = None


def bench_soak(
    model: str | Path = "emoji-ar",
    *,
    minutes: float = 10,
    clients: int = 16,
    max_batch: int = 8,
    device: str | torch.device | None = None,
) -> dict:
    """Send mixed requests of many clients for some minutes, and compare each answer with that of a single call.

    Args:
        model: a bundled name or a folder of a model that samples and edits.
        minutes: how long, above 0.
        clients: concurrent clients, each with one request at a time.
        max_batch, device: as of `studio serve`.

    Returns:
        A dict:

        - "requests", by kind, and of all of them "answered", "refused", "lost", "mixed_up": the answer to another
          request, and "different": not what a single call answers;
        - "given_up": requests whose client left, beside these; "left_over": images that wait or run 10 seconds later;
        - "images_per_second", "p50_seconds" and "p95_seconds";
        - "memory_mib" of the server by minute, and "memory_mib_per_hour": the slope over all but the first fifth.

    Raises:
        StudioError: where the server does not start.
    """
    minutes = check_number("minutes", minutes, 0, 24 * 60, above=True)
    clients = check_integer("clients", clients, 1, 1000)
    pool = expected_answers(model, device)
    command = ["--model", str(model), "--dtype", "float32", "--max-batch", str(max_batch), "--max-images", "2"]
    command += ["--max-waiting", str(max(64, 4 * clients)), "--max-per-user", str(4 * clients)]
    command += ["--devices", str(device)] if device else []
    with tempfile.TemporaryDirectory() as folder, running_server(command, Path(folder)) as (url, process):
        with (
            ThreadPoolExecutor(clients) as threads,
            httpx.Client(base_url=url, timeout=LONGEST_ANSWER, limits=httpx.Limits(max_connections=None)) as http,
        ):
            memory, ends = _Memory(process), time.monotonic() + 60 * minutes
            runs = [threads.submit(_keep_asking, http, pool, client, ends) for client in range(clients)]
            found = [each for run in runs for each in run.result()]
            memory.end()
            left_over = _left_over(http)
    seconds = [each.seconds for each in found if each.seconds is not None]
    kinds = {kind: sum(each.kind == kind for each in found) for kind in ("generation", "edit", "question")}
    verdicts = ("answered", "refused", "lost", "mixed_up", "different")
    return {
        "model": str(model),
        "minutes": minutes,
        "clients": clients,
        "requests": kinds,
        **{verdict: sum(verdict in each.verdicts for each in found) for verdict in verdicts},
        "given_up": sum(each.hung_up for each in found),
        "left_over": left_over,
        "images_per_second": sum(each.images for each in found) / (60 * minutes),
        "p50_seconds": float(np.median(seconds)) if seconds else None,
        "p95_seconds": float(np.quantile(seconds, 0.95)) if seconds else None,
        **memory.figures(),
    }


def expected_answers(model: str | Path, device: Any) -> list[Expected]:
    """The different requests of a soak, with the answers of single calls."""
    requests = round_of(0, _GENERATIONS, True, settings_of(model, device))
    alone = sampled_alone(model, device, requests)
    found = [Expected("generation", request, images) for request, images in zip(requests, alone)]
    pipe, reader = load(model, device=device, dtype="float32"), load(_READER, device=device)
    pipe.set_progress_bar_config(disable=True)
    for number_, images in enumerate(alone[:_OTHERS]):
        seed = 10_000 + number_
        picture = Image.fromarray(images[0])
        edited = pipe(
            "a green book",
            image=picture,
            mask_image=_lower_half(picture),
            generator=torch.Generator().manual_seed(seed),
        )
        request = Request("a green book", seed)
        found.append(Expected("edit", request, [np.asarray(edited.images[0])], original=images[0]))
        answer = reader(picture, _QUESTION, max_new_tokens=_LENGTH).answer
        found.append(Expected("question", requests[number_], images, answer))
    return found


@dataclass(frozen=True)
class _Result:
    kind: str
    verdicts: tuple[str, ...]
    seconds: float | None
    images: int
    hung_up: bool


def _keep_asking(http: httpx.Client, pool: list[Expected], client: int, ends: float) -> list[_Result]:
    """Ask one request after the other until the time is over."""
    chance, results = random.Random(client), []
    while time.monotonic() < ends:
        expected, streams, hangs_up = chance.choice(pool), chance.random() < 0.25, chance.random() < 0.1
        hangs_up &= expected.kind == "generation"
        began = time.perf_counter()
        if expected.kind == "question":
            verdicts, images = judged_answer(_asked(http, expected), expected, pool), 0
        else:
            if expected.kind == "edit":
                outcome = _edited(http, expected)
            else:
                outcome = ask(http, expected.request, streams, hangs_up)
            verdicts, images = judged_images(outcome, expected, pool), expected.request.count
        is_answered = "answered" in verdicts
        seconds = time.perf_counter() - began if is_answered else None
        results.append(_Result(expected.kind, verdicts, seconds, images * is_answered, hangs_up))
    return results


def judged_images(outcome: Outcome, expected: Expected, pool: list[Expected]) -> tuple[str, ...]:
    """What an outcome counts as; a colour may be off by the one level of 255 that the rounding of a batch may cost."""
    if isinstance(outcome, Refusal):
        return ("refused",)
    if outcome is None or len(outcome.images) != expected.request.count:
        return ("lost",)
    if all(map(_alike, outcome.images, expected.images)) and _says_so(outcome, expected):
        return ("answered",)
    others = [image for each in pool if each is not expected for image in each.images]
    is_other = any(_alike(image, other) for image in outcome.images for other in others)
    return ("answered", "different", *(["mixed_up"] if is_other or not _says_so(outcome, expected) else []))


def judged_answer(answer: str | Refusal | None, expected: Expected, pool: list[Expected]) -> tuple[str, ...]:
    """What the answer to a question counts as."""
    if isinstance(answer, Refusal) or answer is None:
        return ("refused" if answer else "lost",)
    if answer == expected.answer:
        return ("answered",)
    is_other = any(answer == each.answer for each in pool if each.kind == "question")
    return ("answered", "different", *(["mixed_up"] if is_other else []))


def _says_so(outcome: Answer, expected: Expected) -> bool:
    return all(says(record, expected.request, place) for place, record in enumerate(outcome.records))


def _alike(image: np.ndarray, other: np.ndarray) -> bool:
    return image.shape == other.shape and int(np.abs(image.astype(int) - other).max()) <= 1


def _edited(http: httpx.Client, expected: Expected) -> Outcome:
    assert expected.original is not None
    original = Image.fromarray(expected.original)
    mask = Image.new("RGBA", original.size, "black")
    mask.paste((0, 0, 0, 0), (0, 0), _lower_half(original))
    files = {"image": ("image.png", _png(original)), "mask": ("mask.png", _png(mask))}
    form = {"prompt": expected.request.prompt, "seed": str(expected.request.seed)}
    return outcome_of(http, EDITS, files=files, data=form)


def _asked(http: httpx.Client, expected: Expected) -> str | Refusal | None:
    url = f"data:image/png;base64,{base64.b64encode(_png(Image.fromarray(expected.images[0]))).decode()}"
    parts = [{"type": "text", "text": _QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": _READER, "messages": [{"role": "user", "content": parts}], "max_tokens": _LENGTH}
    try:
        answer = http.post(CHAT, json=body)
        if answer.is_error:
            return Refusal(answer.status_code, answer.json()["error"]["message"])
        return answer.json()["choices"][0]["message"]["content"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def _lower_half(image: Image.Image) -> Image.Image:
    """A mask that is white in the lower half."""
    mask = Image.new("L", image.size)
    mask.paste(255, (0, image.height // 2, *image.size))
    return mask


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _left_over(http: httpx.Client) -> int:
    """Images that wait or run; those of clients that left just now are given a moment."""
    ends = time.monotonic() + _LONGEST_QUIET
    while True:
        left = int(number(http, "studio_waiting_images") + number(http, "studio_running_images"))
        if not left or time.monotonic() > ends:
            return left
        time.sleep(0.2)


class _Memory(threading.Thread):
    """Looks at the resident memory of a server every two seconds."""

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self._process, self._ended, self._began = process, threading.Event(), time.monotonic()
        self.samples: list[tuple[float, float]] = []
        self.start()

    def run(self) -> None:
        while True:
            self.samples.append((time.monotonic() - self._began, memory_of(self._process) / MIB))
            if self._ended.wait(_SAMPLES):
                return

    def end(self) -> None:
        """Stop."""
        self._ended.set()
        self.join()

    def figures(self) -> dict[str, Any]:
        """Means by minute, and the slope over all but the first fifth, by least squares."""
        times, sizes = np.array(self.samples).T
        minutes = (times // 60).astype(int)
        means = [round(float(sizes[minutes == each].mean()), 1) for each in range(minutes.max() + 1)]
        late = times >= times[-1] / 5
        slope = np.polyfit(times[late], sizes[late], 1)[0] if late.sum() > 1 else float("nan")
        return {"memory_mib": means, "memory_mib_per_hour": float(3600 * slope)}
