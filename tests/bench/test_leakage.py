"""The leakage table: its cases, and its shares for a judge that is told what to see."""

import numpy as np
import pytest
import torch

from studio import StudioError
from studio.bench import leakage as bench
from studio.data.archive import load_concepts
from studio.data.backgrounds import NAMES


class Told:
    """A judge's scores with the given concepts on top."""

    def __init__(self, concepts):
        self.concepts = torch.nn.functional.one_hot(torch.as_tensor(concepts), len(load_concepts())).float()


def told(monkeypatch, concepts):
    monkeypatch.setattr(bench, "judge_scores", lambda judge, images: Told(concepts))
    return bench._row("told", 4, "none", None, None, bench.leakage_cases())


def test_every_object_is_on_every_other_colour_and_on_gray():
    cases = bench.leakage_cases()
    assert len(cases) == 3 * 8 * 2 * 8 and len(np.unique(cases, axis=0)) == len(cases)
    labels = [concept.label for concept in load_concepts()]
    assert {NAMES[row] for row in cases[:, 2]} == {*bench.COLOURS, "gray"}
    assert all(labels[concept].split()[0] != NAMES[ground] for concept, _, ground in cases.tolist())


def test_shares_are_those_that_the_judge_was_told(monkeypatch):
    """An object that is seen as it is does not leak; one that is seen in the background's colour leaks wholly."""
    cases, families = bench.leakage_cases(), np.array(bench.families())
    row = told(monkeypatch, cases[:, 0])
    assert (row["own"], row["background"], row["neutral"], row["leakage"], row["n"]) == (1, 0, 0, 0, 336)
    kinds = [int(np.argwhere(families == concept)[0, 0]) for concept in cases[:, 0]]
    leaked = [
        families[kind][bench.COLOURS.index(NAMES[ground])] if NAMES[ground] in bench.COLOURS else own
        for kind, (own, _, ground) in zip(kinds, cases.tolist())
    ]
    row = told(monkeypatch, leaked)
    assert (row["own"], row["background"], row["neutral"], row["leakage"]) == (0, 1, 0, 1)
    assert row["matrix"][0][0] is None and row["matrix"][0][1] == 1
    always_red = told(monkeypatch, families[kinds, bench.COLOURS.index("red")])
    assert always_red["background"] == pytest.approx(always_red["neutral"]) and always_red["leakage"] == pytest.approx(
        0
    )


def test_other_models_are_refused():
    with pytest.raises(StudioError, match="is not text-conditional"):
        bench.bench_leakage(["emoji-vq"], device="cpu")
