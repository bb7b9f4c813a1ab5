"""Plain decoding side by side with another, in turns."""

import asyncio
import threading
import time

import pytest
import torch
from PIL import Image

from studio import DECODINGS
from studio.ui.jobs import side_by_side
from studio.ui.jobs.side_by_side import TurnScheduler
from studio.ui.tabs import generate

FIELDS = ["a red apple", 4, "7", "", "", "", "", "speculative", {}]


def updates(*fields):
    async def collect():
        return [update async for update in generate.show_side_by_side("tiny", *fields)]

    return asyncio.run(collect())


def test_both_sides_sample_what_they_sample_alone(steps, tiny_pipeline):
    found = updates(*FIELDS)
    runs, status = found[-1][1:]
    sampled = [image for image, _ in [gallery["value"] for gallery, _, _ in found if "value" in gallery][-1]]
    for image, decoding in zip(map(Image.open, sampled), ("ar", "speculative"), strict=True):
        alone = tiny_pipeline(
            "a red apple", generator=torch.Generator().manual_seed(7), decoding=DECODINGS[decoding].settings()
        )
        assert image.tobytes() == alone.images[0].tobytes()
    assert runs.count('<section class="studio-lane done">') == 2 and runs.count("<svg") == 2
    assert "Speculative took" in status and "plain" in status


def test_clocks_go_up_and_are_shown_before_the_end(steps):
    found = [runs for _, runs, _ in updates(*FIELDS) if isinstance(runs, str)]
    assert any('class="studio-lane running"' in runs for runs in found)
    assert found[0] != found[-1]


def test_the_default_compares_jacobi_with_plain_decoding(steps, tiny_pipeline):
    found = updates("a red apple", 1, "7", "", "", "", "", "exact", {})
    images = [image for image, _ in [gallery["value"] for gallery, _, _ in found if "value" in gallery][-1]]
    assert Image.open(images[0]).tobytes() == Image.open(images[1]).tobytes()
    assert "Jacobi took" in found[-1][2] and "plain" in found[-1][2]


def test_plain_decoding_is_compared_with_the_next(steps, toasts):
    found = updates("a red apple", 1, "7", "", "", "", "", "ar", {})
    assert not toasts and "Jacobi took" in found[-1][2]


def test_a_model_with_one_decoding_has_nothing_to_compare(steps, toasts, monkeypatch):
    monkeypatch.setattr(side_by_side, "fitting_decodings", lambda name: ["ar"])
    found = updates("a red apple", 1, "7", "", "", "", "", "ar", {})
    assert len(toasts) == 1 and "one decoding only" in toasts[0]
    assert "unchanged" in found[-1][2] and not steps


def test_a_refused_side_ends_both(steps, toasts):
    found = updates(*FIELDS[:-2], "lantern", {"k": "64"})
    assert len(toasts) == 1 and "64 codes" in toasts[0]
    assert "unchanged" in found[-1][2]
    assert len(steps) < 16


def test_closing_stops_both_within_one_step(steps):
    async def close_after_a_while():
        following = generate.show_side_by_side("tiny", *FIELDS)
        async for _ in following:
            if len(steps) >= 6:
                break
        await following.aclose()
        return len(steps)

    at_cancel = asyncio.run(close_after_a_while())
    time.sleep(0.4)
    assert 6 <= at_cancel < 20
    assert len(steps) <= at_cancel + 2


def test_the_one_behind_goes_on_and_never_two_at_once():
    turns, running, most, ended = TurnScheduler(2), [], [], {}

    def lane(number, seconds, rounds):
        turns.go(number)
        for _ in range(rounds):
            running.append(number)
            most.append(len(running))
            time.sleep(seconds)
            running.remove(number)
            turns.stop(number)
            turns.go(number)
        turns.stop(number)
        turns.leave(number)
        ended[number] = [*turns.clocks]

    threads = [threading.Thread(target=lane, args=args) for args in ((0, 0.02, 20), (1, 0.02, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert max(most) == 1
    assert ended[1][0] == pytest.approx(ended[1][1], abs=0.1)
    assert turns.clocks[0] > 2 * turns.clocks[1]
