"""The authors' token pruners, recorded: picks, budgets, masks, ratios, scores, packed order; attention of CLS."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from studio.pruning import globalcom2 as gc2
from studio.pruning import hired as hi
from studio.pruning.attention import Attention, cls_logits, cls_probabilities
from studio.pruning.divprune import diverse_order, divprune
from studio.pruning.layout import Layout
from tests.parity.recordings import find

TOLERANCE = 2e-5


def cases(form):
    """Every case of every recording of a form, named by both."""
    return [
        pytest.param(path, case, id=f"{path.stem}-{case['case']}")
        for path in find(form)
        for case in json.loads(path.read_text())["cases"]
    ]


def reference_sequence(logits, layout, ratio, tau):
    """The authors' order and places, faults included: thumbnail tokens by descending score; then partition * N + token
    of the crops, -1 after each row of the canvas, padding rows included, in the order of the canvas if every crop had
    its valid tokens first, its padding last."""
    (height, width), (rows, columns) = layout.size, layout.grid
    tokens = height * width
    thumbnail = logits[0].topk(int(tokens * ratio)).indices
    ids = torch.full((layout.partitions, tokens), -2)
    shares = gc2.crop_ratios(logits[0], layout.size, layout.grid, ratio, tau)
    for crop, (scores, share) in enumerate(zip(gc2.crop_scores(logits, layout), shares.tolist()), start=1):
        chosen = scores.topk(int(len(scores) * share)).indices
        ids[crop, chosen] = layout.ids[layout.region(crop)][chosen]
    canvas = ids[1:].view(rows, columns, height, width).permute(0, 2, 1, 3).reshape(rows * height, columns * width)
    sequence = F.pad(canvas, (0, 1), value=-1).flatten()
    return thumbnail, sequence[sequence != -2]


def arrays(path, case):
    """The arrays of one case, without its prefix."""
    with np.load(path.with_suffix(".npz")) as stored:
        prefix = case["case"] + "_"
        return {name[len(prefix) :]: torch.from_numpy(stored[name]) for name in stored if name.startswith(prefix)}


def features_of(layout):
    return torch.zeros(len(layout), 1)


def anyres(case, image_hw, newlines=True):
    grid = tuple(case["grid_hw"])
    assert case["side"] ** 2 == case["N"]
    return Layout.anyres(case["side"], grid, tuple(image_hw), newlines=newlines)


@pytest.mark.parametrize(("path", "case"), cases("divprune"))
def test_divprune(path, case):
    io = arrays(path, case)
    assert torch.equal(diverse_order(io["features"], case["k"]), io["picks"])
    assert torch.equal(divprune(io["features"], float(case["ratio"]), reference=True), io["picks"].sort().values)


@pytest.mark.parametrize("cells", hi.CELLS)
@pytest.mark.parametrize(("path", "case"), cases("hired"))
def test_hired(path, case, cells):
    io = arrays(path, case)
    size, grid, ratio, alpha = (case["side"],) * 2, tuple(case["grid_hw"]), case["token_budget_rate"], case["alpha"]
    first, last = (io[f"{name}_layer_cls"][:, :, 1:].sum(dim=1) for name in ("first", "last"))
    hits = hi.crop_hits(first[0], size, grid, alpha, cells)
    assert torch.equal(hits, io[f"counts_{cells}"])
    budgets = hi.reference_budgets(hits, case["N"], ratio, alpha)
    assert torch.equal(budgets, io[f"budgets_{cells}"])
    masks = hi.reference_masks(last, budgets)
    assert torch.equal(masks, io[f"mask_{cells}"])

    layout = anyres(case, case["image_hw"])
    chosen = hi.hired(
        features_of(layout),
        float(ratio),
        attention=Attention(first=first, last=last),
        layout=layout,
        reference=True,
        alpha=alpha,
        cells=cells,
    )
    expected = io.get(f"packed_ids_{cells}")
    if expected is None:
        expected = layout.ids[layout.content][masks.flatten()[layout.ids[layout.content]]]
    assert torch.equal(layout.ids[chosen], expected)


@pytest.mark.parametrize(("path", "case"), cases("globalcom2"))
def test_globalcom2(path, case):
    io = arrays(path, case)
    logits, ratio, tau = io["cls_logits"], case["retention_ratio"], case["temperature"]
    width, height = case["image_wh"]
    layout = anyres(case, (height, width))
    crops = [layout.region(partition) for partition in range(1, layout.partitions)]
    sizes = [[len(values[crop].unique()) for values in (layout.column, layout.row)] for crop in crops]
    assert sizes == io["crop_dims_wh"].tolist()

    rho = gc2.crop_ratios(logits[0], layout.size, layout.grid, ratio, tau)
    torch.testing.assert_close(rho, io["scales"].double(), atol=1e-6, rtol=0)
    shared = torch.cat(gc2.thumbnail_on_canvas(logits[0], layout))
    torch.testing.assert_close(shared, io["global_crop_scores"], atol=TOLERANCE, rtol=1e-5)

    kept = io["crop_keep"].tolist()
    assert [int(len(crop) * share) for crop, share in zip(crops, rho.tolist())] == kept
    picks = [
        layout.token[crop][scores.argsort(descending=True)[:keep]]
        for crop, scores, keep in zip(crops, gc2.crop_scores(logits, layout), kept)
    ]
    assert torch.equal(torch.cat(picks), io["crop_topk_flat"])

    thumbnail, packed = reference_sequence(logits, layout, ratio, tau)
    assert torch.equal(thumbnail, io["thumb_idx_desc"])
    assert torch.equal(packed, io["packed_ids_reference"])

    chosen = gc2.globalcom2(
        features_of(layout), float(ratio), attention=Attention(logits=logits), layout=layout, reference=True, tau=tau
    )
    ids = layout.ids[chosen]
    expected = [p * case["N"] + tokens for p, tokens in enumerate([io["thumb_idx_desc"], *picks])]
    assert torch.equal(ids[ids >= 0].sort().values, torch.cat(expected).sort().values)
    assert (ids < 0).sum() == len(layout.newlines)


@pytest.mark.parametrize(("path", "case"), cases("cls_attention"))
def test_cls_attention(path, case):
    io = arrays(path, case)
    queries, keys = (F.linear(io["hidden"], io[f"{x}_proj_weight"], io[f"{x}_proj_bias"]) for x in "qk")
    logits = cls_logits(queries, keys, case["heads"])
    torch.testing.assert_close(logits, io["globalcom2_cls_logits"], atol=TOLERANCE, rtol=0)
    assert torch.equal(cls_logits(queries[:, :1], keys, case["heads"]), logits)
    probabilities = cls_probabilities(queries, keys, case["heads"])
    torch.testing.assert_close(probabilities, io["hired_cls_probs_headsum"], atol=TOLERANCE, rtol=0)
