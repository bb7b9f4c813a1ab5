"""Cen-Prune, CDPruner, MMTok and SCOPE: against loops and brute force, and what they read off a model."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from studio.errors import StudioError
from studio.pruning.adapters import family_of
from studio.pruning.api import prune, prune_inputs
from studio.pruning.attention import Attention
from studio.pruning.cdpruner import cdpruner, map_order, relevance
from studio.pruning.divprune import centred_order, divprune
from studio.pruning.globalcom2 import globalcom2
from studio.pruning.layout import Layout
from studio.pruning.mmtok import mmtok
from studio.pruning.scope import coverage, coverage_order, greedy_coverage, scope
from tests.pruning.tiny_families import answer, tiny
from tests.pruning.tiny_models import IMAGE

BOUND = 1 - 1 / 2.718281828


def rows(number=12, width=5, seed=0):
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scaled", [False, True])
def test_centred_diversity_beside_a_loop(scaled):
    x = rows(15, 6, seed=4) + 2
    y = x / (x.var(dim=0, correction=0) + 1e-6).sqrt() if scaled else x
    alone, centred = F.normalize(y, dim=1), F.normalize(y - y.mean(0), dim=1)
    weight = torch.stack(
        [-torch.stack([a @ b for j, b in enumerate(alone) if j != i]).mean() for i, a in enumerate(alone)]
    )
    if scaled:
        weight = torch.sigmoid((weight - weight.mean()) / (weight.std(correction=0) + 1e-6))
    else:
        weight = (weight - weight.min()) / (weight.max() - weight.min() + 1e-6)
    distance = 1 - centred @ centred.T
    order = [max(range(15), key=lambda i: min(float(distance[i, j]) for j in range(15) if j != i))]
    while len(order) < 8:
        rest = [i for i in range(15) if i not in order]
        order.append(max(rest, key=lambda i: float(weight[i]) * min(float(distance[i, c]) for c in order)))
    assert centred_order(x, 8, scaled=scaled).tolist() == order


def test_what_centred_diversity_depends_on():
    x = rows(30, 6, seed=1) + 1
    order = centred_order(x, 12)
    assert torch.equal(order, centred_order(x, 20)[:12]) and len(order.unique()) == 12
    turn = torch.linalg.qr(rows(6, 6, seed=2)).Q
    assert torch.equal(centred_order(3 * x @ turn, 12), order)
    assert not torch.equal(centred_order(x + 5, 12), order)
    scale = torch.tensor([1, 1000.0, 1, 0.1, 1, 1])
    assert torch.equal(centred_order(x * scale, 12, scaled=True), centred_order(x, 12, scaled=True))
    assert not torch.equal(centred_order(x * scale, 12), order)
    assert len(centred_order(torch.ones(6, 3), 6).unique()) == 6
    layout = Layout.anyres(6, (1, 2), (36, 72))
    kept = divprune(rows(len(layout), 4), 30, layout=layout, centred=True)
    assert len(kept) == 30 and not torch.equal(kept, divprune(rows(len(layout), 4), 30, layout=layout))


@pytest.mark.parametrize("theta", [None, 0.0, 0.6])
def test_conditional_diversity_is_greedy_in_the_determinant(theta):
    x, text = rows(10, 7), rows(3, 7, seed=1)
    r = relevance(x, text, theta)
    mean = torch.stack([torch.stack([F.cosine_similarity(a, b, 0) for b in text]).mean() for a in x])
    plain = (mean - mean.min() + 1e-6) / (mean.max() - mean.min() + 1e-6)
    torch.testing.assert_close(r, plain if theta is None else (theta / (2 * (1 - theta)) * plain).exp())
    unit = F.normalize(x, dim=1) * r[:, None]
    kernel, order = (unit @ unit.T).double() + 1e-4 * torch.eye(10).double(), []
    for _ in range(6):
        rest = [i for i in range(10) if i not in order]
        order.append(max(rest, key=lambda i: float(torch.logdet(kernel[[*order, i]][:, [*order, i]]))))
    assert map_order(x, r, 6).tolist() == order
    assert cdpruner(x, 6, text=text, theta=theta).tolist() == sorted(order)


def test_conditional_diversity_above_the_rank_repeats_nothing():
    low = rows(40, 6) @ rows(6, 9, seed=3)
    for features in (low, torch.ones(12, 4), torch.zeros(12, 4)):
        kept = cdpruner(features, 11, text=rows(2, features.shape[1], seed=5))
        assert len(kept.unique()) == 11
    with pytest.raises(StudioError, match="needs the question"):
        cdpruner(low, 3)
    with pytest.raises(StudioError, match="theta"):
        cdpruner(low, 3, text=rows(2, 9), theta=1)


def test_coverage_of_question_and_image_is_near_the_best():
    for seed in range(10):
        x, text = rows(9, 4, seed), rows(3, 4, seed + 50)
        unit, asked = F.normalize(x, dim=1), F.normalize(text, dim=1)
        matrix = torch.cat(((asked @ unit.T / 0.02).softmax(1) / 3, (unit @ unit.T / 0.2).softmax(1) / 18))

        def covered(chosen, matrix=matrix):
            return float(matrix[:, list(chosen)].amax(1).sum())

        kept = mmtok(x, 3, text=text).tolist()
        assert covered(kept) >= BOUND * max(map(covered, combinations(range(9), 3)))
        order = greedy_coverage(matrix, 9).tolist()
        totals = [0.0, *(covered(order[: number + 1]) for number in range(9))]
        gains = [after - before for before, after in zip(totals, totals[1:])]
        assert sorted(order[:3]) == kept and all(a >= b - 1e-6 for a, b in zip(gains, gains[1:]))


def test_saliency_and_coverage_beside_a_loop():
    layout, sample = Layout.plain(4, 5), torch.Generator().manual_seed(1)
    x, last = rows(20, 6, seed=2), torch.rand(1, 20, generator=sample)
    alike, best, order = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T, torch.zeros(20), []
    for _ in range(7):
        gains = [float((alike[:, u] - best).clamp(min=0).sum() * last[0, u]) for u in range(20)]
        order.append(max((u for u in range(20) if u not in order), key=gains.__getitem__))
        best = torch.maximum(best, alike[:, order[-1]])
    assert scope(x, 7, attention=Attention(last=last), layout=layout).tolist() == sorted(order)
    even = scope(x, 7, attention=Attention(last=torch.ones(1, 20)), layout=layout)
    assert torch.equal(even, coverage(x, 7, layout=layout)) and even.tolist() != sorted(order)
    assert even.tolist() == sorted(coverage_order(x, 7).tolist())


@pytest.mark.parametrize("method", ["cdpruner", "mmtok"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_the_question_is_the_text_behind_the_image(family, method):
    made = tiny(family)
    inputs = made.prompt(((0,), (1, 2)) if family != "smolvlm" else ((0,), (1,)))
    _, info = prune_inputs(made.model, inputs, method, keep=0.2)
    found = family_of(made.model, method)
    given = {name: value for name, value in inputs.items() if "pixel" in name or "image_" in name or "batch" in name}
    features = found.features(found.base.get_image_features(**given), inputs)
    for row, images in enumerate(([0], [1, 2] if family != "smolvlm" else [1])):
        ids = inputs["input_ids"][row]
        asked = ids[int((ids == IMAGE).nonzero()[-1]) + 1 :]
        text = made.model.get_input_embeddings()(asked[asked > 2])
        for image in images:
            select = {"cdpruner": cdpruner, "mmtok": mmtok}[method]
            kept = select(features[image], 0.2, text=text, layout=info.layouts[image])
            assert torch.equal(info.kept[image], kept)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -4:] = torch.tensor([7, 8, 9, 10])
    assert not all(map(torch.equal, info.kept, prune_inputs(made.model, other, method, keep=0.2)[1].kept))
    bare = {**inputs, "input_ids": inputs["input_ids"].clone()}
    bare["input_ids"][0, int((bare["input_ids"][0] == IMAGE).nonzero()[-1]) + 1 :] = 2
    with pytest.raises(StudioError, match="needs the question"):
        prune_inputs(made.model, bare, method, keep=0.2)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_features_before_the_merger(family):
    made, seen = tiny(family), []
    inputs = made.prompt(((0, 1, 2),))
    tower = made.model.model.visual
    hook = tower.merger.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    encoded = made.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    hook.remove()
    before, after = seen[0]
    order = torch.cdist(torch.cat(encoded.pooler_output), after).argmin(1)
    expected = (
        before.float()
        .view(len(after), -1, before.shape[-1])
        .mean(1)[order]
        .split([len(part) for part in encoded.pooler_output])
    )
    _, info = prune_inputs(made.model, inputs, "divprune", keep=0.3, centred=True)
    for kept, rows_of, part in zip(info.kept, expected, encoded.pooler_output):
        assert torch.equal(kept, centred_order(rows_of, len(kept), scaled=True).sort().values)
        assert torch.equal(kept, divprune(part, 0.3, attention=Attention(unmerged=rows_of), centred=True))
    with prune(made.model, "divprune", keep=0.3, centred=True) as record:
        answer(made.model, inputs)
    assert all(map(torch.equal, record.info.kept, info.kept))


def test_options_of_budgets_and_scores():
    made = tiny("llava_next")
    inputs = made.prompt()
    _, plain = prune_inputs(made.model, inputs, "hired", keep=0.3)
    _, even = prune_inputs(made.model, inputs, "hired", keep=0.3, alpha="proportional")
    layout = even.layouts[0]
    shares = [int((layout.partition[info.kept[0]] == 0).sum()) for info in (plain, even)]
    content = int((layout.partition[even.kept[0]] >= 0).sum())
    assert shares[1] == int(content * 36 / len(layout.content)) < shares[0]
    assert len(even.kept[0]) == len(plain.kept[0]) == round(0.3 * len(layout))
    family = family_of(made.model, "globalcom2")
    given = {name: value for name, value in inputs.items() if "pixel" in name or "image_" in name}
    with family.tap(("last", "logits"), inputs) as tap:
        family.base.get_image_features(**given)
    scores = family.scores(tap, inputs, 1)[0]
    moved = Attention(logits=scores.last)
    features = torch.zeros(len(layout), 1)
    _, feature = prune_inputs(made.model, inputs, "globalcom2", keep=0.3, scores="feature")
    assert torch.equal(feature.kept[0], globalcom2(features, 0.3, attention=moved, layout=layout))
    _, usual = prune_inputs(made.model, inputs, "globalcom2", keep=0.3)
    assert not torch.equal(feature.kept[0], usual.kept[0])
    for method, option in (
        ("hired", {"alpha": "much"}),
        ("globalcom2", {"scores": "first"}),
        ("divprune", {"centred": 2}),
    ):
        with pytest.raises(StudioError, match=next(iter(option))):
            prune_inputs(made.model, inputs, method, keep=0.3, **option)
