"""The hardware on a model card."""

from types import SimpleNamespace

import pytest
import torch

from studio.training import card


@pytest.mark.parametrize(
    ("processes", "threads", "words"),
    [(1, 1, "1 process, 1 m CPU thread"), (1, 2, "1 process, 2 m CPU threads"), (2, 1, "2 processes, 1 m CPU thread")],
)
def test_card_counts_processes_and_threads(monkeypatch, processes, threads, words):
    monkeypatch.setattr(card.platform, "machine", lambda: "m")
    monkeypatch.setattr(card.torch, "get_num_threads", lambda: threads)
    assert card._hardware(SimpleNamespace(device=torch.device("cpu"), num_processes=processes)) == words
