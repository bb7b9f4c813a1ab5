"""The authors' latent perturbation, recorded."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from studio.evaluation.robustness import Perturbation, perturbed_codes
from tests.parity.recordings import find

CASES = [
    pytest.param(path, number, id=f"{path.stem}-{number}")
    for path in find("robusttok_perturbation")
    for number in range(len(json.loads(path.read_text())["cases"]))
]


@pytest.mark.parametrize(("path", "number"), CASES)
def test_perturbation(path, number):
    case, arrays = json.loads(path.read_text())["cases"][number], load_file(path.with_suffix(".safetensors"))
    z, codebook = arrays["z"], arrays["codebook"]
    vectors, shape = z.flatten(2).transpose(1, 2), (len(z), -1)
    if case["codebook_norm"]:
        vectors, codebook = F.normalize(vectors, dim=-1), F.normalize(codebook, dim=-1)
    codes = perturbed_codes(
        vectors,
        codebook,
        Perturbation(case["alpha"], case["delta"]),
        beta=case["beta"],
        chance=arrays[f"c{number}.uniform"].view(shape),
        rank=arrays[f"c{number}.rank"].view(shape),
    )
    recorded = arrays[f"c{number}.out"]
    torch.testing.assert_close(codebook[codes].transpose(1, 2).view_as(z), recorded, atol=2e-5, rtol=1e-4)
    kept = int(case["beta"] * len(z))
    torch.testing.assert_close(recorded[kept:], arrays[f"c{number}.z_q"][kept:], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(recorded[:kept], arrays[f"c{number}.z_q"][:kept], atol=0.1)
