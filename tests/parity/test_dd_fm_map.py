"""The noise-to-token map against a dense float64 oracle: tokens, Euler end points, the field, points on the way."""

import re

import numpy as np
import pytest
import torch

from studio.decoding.noise_map import Flow, codebook_scales, euler, log_spaced, noise_to_token, rk4
from tests.parity.recordings import find

EXACT = {"atol": 1e-9, "rtol": 1e-9}


def groups(array):
    """Every group of arrays that has this one, named by its recording."""
    for path in find("dd_fm_map"):
        with np.load(path.with_suffix(".npz")) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored}
        for group in sorted({name.split(".")[0] for name in arrays}):
            own = {name[len(group) + 1 :]: value for name, value in arrays.items() if name.startswith(f"{group}.")}
            if array in own:
                yield pytest.param(own, id=f"{path.stem}-{group}")


analytic = pytest.mark.parametrize("own", [*groups("margin")])
dense = pytest.mark.parametrize("own", [*groups("robust")])


@analytic
def test_exact_answers(own):
    noise, codebook = own["noise"], own["codebook"]
    probs = own["probs"].expand(len(noise), -1)
    for margin, steps, method in ((0.02, 24, "multistep"), (5e-3, 64, "multistep"), (1e-4, 400, "rk4")):
        clear = own["margin"].abs() > margin
        tokens = noise_to_token(noise, probs, codebook, steps, method=method)
        assert torch.equal(tokens[clear], own["token"][clear]), method


@dense
def test_tokens(own):
    robust = own["robust"]
    for dtype in (torch.float32, torch.float64):
        inputs = [own[name].to(dtype) for name in ("noise", "probs", "codebook")]
        wrong = noise_to_token(*inputs) != own["token"]
        assert float(wrong.double().mean()) <= 0.02 and float(wrong[robust].double().mean()) <= 0.01
        tokens = noise_to_token(*inputs, 64)
        assert torch.equal(tokens[robust], own["token"][robust])
        tokens = noise_to_token(*inputs, 100, method="euler")
        assert torch.equal(tokens[robust], own["token"][robust])
    tokens = noise_to_token(*inputs, 400, method="rk4")
    assert torch.equal(tokens[robust], own["token"][robust])
    torch.testing.assert_close(own["codebook"][own["token"]], own["endpoint"], **EXACT)


@dense
def test_euler(own):
    flow = Flow(own["probs"].log(), own["codebook"])
    steps = [int(match[1]) for name in own if (match := re.fullmatch(r"euler(\d+)\.token", name))]
    assert steps
    for count in steps:
        last, end = euler(flow, own["noise"], count)
        torch.testing.assert_close(end, own[f"euler{count}.x_final"], **EXACT)
        assert torch.equal(last.token, own[f"euler{count}.token"])
        tokens = noise_to_token(own["noise"], own["probs"], own["codebook"], count, method="euler")
        assert torch.equal(tokens, own[f"euler{count}.token"])


@dense
def test_field(own):
    flow = Flow(own["probs"].log(), own["codebook"])
    times = [match[1] for name in own if (match := re.fullmatch(r"field\.t(.+)\.x", name))]
    assert times
    for time in times:
        x = own[f"field.t{time}.x"]
        torch.testing.assert_close(flow.at_time(x, float(time)).mean, own[f"field.t{time}.denoised"], **EXACT)
        velocity = (flow.at_time(x, float(time), pick=False).mean - x) / (1 - float(time))
        torch.testing.assert_close(velocity, own[f"field.t{time}.velocity"], **EXACT)


@dense
def test_points_on_the_way(own):
    codebook = own["codebook"]
    flow, radius = Flow(own["probs"].log(), codebook - codebook.mean(dim=0)), codebook_scales(codebook)[0]
    for t, expected in zip(own["traj_t"].tolist(), own["traj"]):
        sigmas = log_spaced(1000 * radius, (1 - t) / t, 600)
        x = t * (rk4(flow, own["noise"], sigmas)[1] + codebook.mean(dim=0))
        torch.testing.assert_close(x[own["robust"]], expected[own["robust"]], atol=1e-5, rtol=0)
