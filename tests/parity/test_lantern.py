"""The authors' acceptance rules, exact laws, drafter and whole greedy runs, recorded."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from recordings import find, stem  # noqa: E402

from studio.decoding.acceptance import Relaxation, weigh  # noqa: E402
from studio.decoding.neighbours import neighbour_table  # noqa: E402
from studio.decoding.sampling import Sampling  # noqa: E402
from studio.decoding.trees import StaticTree, Tree  # noqa: E402
from studio.decoding.verification import verify, verify_greedy  # noqa: E402

CLOSE = {"atol": 2e-6, "rtol": 2e-6}
DYNAMIC, STATIC, LAWS = find("lantern_accept_dynamic"), find("lantern_accept_static"), find("lantern_exact_law")


class Arrays:
    """A recording of numpy arrays: `info`, arrays by name, and those of case N without its prefix."""

    def __init__(self, path):
        self.info = json.loads(path.read_text())
        self.arrays = {name: torch.from_numpy(array) for name, array in np.load(path.with_suffix(".npz")).items()}

    def __getitem__(self, name):
        return self.arrays[name]

    def case(self, case):
        prefix = f"c{case['id']}."
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}


def relaxation_of(case, neighbours):
    if not case["lantern"]:
        return None
    delta = case["delta"]
    budget = {"tv_budget": delta} if delta <= 1 else {"ratio_budget": delta}
    return Relaxation(neighbours.long(), min(case["k"], neighbours.shape[1]), reference=True, **budget)


def sampling_of(case):
    return Sampling(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"], order="lantern")


def check(case, verdict, arrays):
    accepted = verdict.path[0, : int(verdict.accepted) + 1].tolist()
    assert accepted == case["accepted_nodes"]
    assert int(verdict.accepted) == case["accept_length"]
    ratios = torch.tensor(verdict.ratios(0), dtype=torch.float64)
    assert len(ratios) == case["uniforms_used"]
    torch.testing.assert_close(ratios, arrays["accept_ratio"].double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(verdict.law[0], arrays["sample_p"].float(), **CLOSE)


@pytest.mark.parametrize("path", DYNAMIC + STATIC + LAWS, ids=stem)
def test_neighbours(path):
    recording = Arrays(path)
    expected = recording["neighbours"].int()
    table = neighbour_table(recording["codebook"], expected.shape[1], normalise=False)
    assert torch.equal(table, expected)


@pytest.mark.parametrize("path", DYNAMIC, ids=stem)
def test_deterministic_drafts(path):
    recording = Arrays(path)
    assert recording.info["cases"]
    for case in recording.info["cases"]:
        arrays, relaxation = recording.case(case), relaxation_of(case, recording["neighbours"])
        tree = Tree(arrays["tokens"][None].long(), arrays["parents"][None].long())
        logits = arrays["tree_logits"][None]
        if case["greedy"]:
            verdict = verify_greedy(tree, logits, relaxation)
            assert verdict.path[0, : int(verdict.accepted) + 1].tolist() == case["accepted_nodes"], case["id"]
            assert int(logits[0, int(verdict.last)].argmax()) == case["next_token_argmax"]
            torch.testing.assert_close(logits[0, int(verdict.last)], arrays["next_logits"])
        else:
            uniforms = arrays["uniforms"][None]
            check(case, verify(tree, logits, uniforms, sampling_of(case), relaxation), arrays)


@pytest.mark.parametrize("path", STATIC, ids=stem)
def test_drawn_drafts(path):
    recording = Arrays(path)
    shape = StaticTree(tuple(map(tuple, recording.info["tree_choices"])))
    assert shape.parents == recording["parents"].tolist()
    assert shape.ranks[1:] == recording["sibling_rank"].tolist()[1:]
    assert shape.depths == recording["tree_position_ids"].tolist()
    assert shape.expanded == recording["draft_rows_node"].tolist()
    proposal_rows = torch.full((shape.nodes,), -1)
    proposal_rows[torch.tensor(shape.expanded)] = torch.arange(len(shape.expanded))
    assert recording.info["cases"]
    for case in recording.info["cases"]:
        arrays = recording.case(case)
        parents = recording["parents"][None].long()
        tree = Tree(arrays["tokens"][None].long(), parents, arrays["draft_q"][None], proposal_rows)
        assert torch.equal(tree.ancestors[0].to(torch.uint8), recording["tree_attn_mask"])
        relaxation, uniforms = relaxation_of(case, recording["neighbours"]), arrays["uniforms"][None]
        check(case, verify(tree, arrays["tree_logits"][None], uniforms, sampling_of(case), relaxation), arrays)


@pytest.mark.parametrize("path", LAWS, ids=stem)
def test_exact_laws(path):
    recording = Arrays(path)
    assert recording.info["cases"]
    for case in recording.info["cases"]:
        arrays = recording.case(case)
        p, tokens = arrays["logits"].softmax(dim=-1), arrays["tokens"].long()
        weighed = weigh(p[None], tokens[None], relaxation=relaxation_of(case, recording["neighbours"]))
        torch.testing.assert_close(
            weighed.ratios[0].double(), arrays["accept_ratio"].double(), atol=1e-5, rtol=1e-5
        )
        law, reached = torch.zeros_like(p, dtype=torch.float64), 1.0
        for token, ratio in zip(tokens, weighed.ratios[0].double().clamp(max=1)):
            law[token] += reached * ratio
            reached = reached * (1 - ratio)
        law += reached * (weighed.rest[0] / weighed.rest[0].sum()).double()
        torch.testing.assert_close(law, arrays["law"], **CLOSE)
        distance = float((law - p.double()).clamp(min=0).sum())
        assert distance == pytest.approx(case["tv_from_target"], abs=CLOSE["atol"])
