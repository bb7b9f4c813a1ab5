"""Tuning a decoder: tokens stay what they are, and codes go wrong as they should."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from studio.checkpoints.loading import load
from studio.errors import StudioError
from studio.training import train
from studio.training.robust_decoder import BETA, DecoderTuning, perturbation_at
from studio.training.vq import reconstruction_loss


@pytest.fixture(params=["tiny_vq", "tiny_rvq"])
def module(request):
    return DecoderTuning(copy.deepcopy(request.getfixturevalue(request.param)), reconstruction_loss)


def images(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def loss(module, batch, alpha, delta):
    torch.manual_seed(3)
    return module(batch, torch.tensor(alpha), torch.tensor(delta))


def test_one_code_or_no_chance_is_the_plain_step_bit_for_bit(module):
    """Control: eight codes at full chance give another loss."""
    batch = images(40)
    tokenizer = module.tokenizer
    plain = reconstruction_loss(tokenizer.decode(tokenizer.encode(batch)), batch)
    assert torch.equal(loss(module, batch, 1.0, 1), plain) and torch.equal(loss(module, batch, 0.0, 8), plain)
    assert not torch.equal(loss(module, batch, 1.0, 8), plain)


def test_only_what_follows_the_codes_has_gradients(module):
    loss(module, images(20), 1.0, 8).backward()
    parts = {name.split(".")[0] for name, weight in module.tokenizer.named_parameters() if weight.grad is not None}
    assert parts == {"post_quant_conv", "decoder"}


def test_only_the_first_images_of_a_batch_are_perturbed(module):
    """Control: the first ones change."""
    seen, batch = [], images(40)
    decode = module.tokenizer.decode
    module.tokenizer.decode = lambda codes: seen.append(codes) or decode(codes)
    loss(module, batch, 1.0, 8)
    plain, first = module.tokenizer.encode(batch), int(BETA * 40)
    assert torch.equal(seen[0][first:], plain[first:]) and not torch.equal(seen[0][:first], plain[:first])


def test_the_perturbation_falls_over_the_run():
    assert perturbation_at(0.0, 100) == perturbation_at(0.2, 100) == (1.0, 100)
    assert perturbation_at(0.4, 100) == pytest.approx((0.75, 75))
    assert perturbation_at(0.6, 100) == perturbation_at(1.0, 100) == (0.5, 50)
    assert perturbation_at(1.0, 1) == (0.5, 1)


def test_parts_of_a_batch_are_restored_from_their_first_levels(tiny_rvq):
    """Control: other depths give another loss."""
    module, batch = DecoderTuning(copy.deepcopy(tiny_rvq), lambda restored, images: restored), images(4)
    plain, codes = torch.tensor(0.0), tiny_rvq.encode(batch)
    restored = module(batch, plain, torch.tensor(1), torch.tensor([3, 1]))
    expected = torch.cat((tiny_rvq.decode(codes[:2]), tiny_rvq.decode(codes[2:], depth=1)))
    assert torch.allclose(restored, expected, atol=1e-5)
    assert not torch.allclose(module(batch, plain, torch.tensor(1), torch.tensor([3, 2])), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vq", "rvq"])
def test_a_tuned_decoder_keeps_the_tokens(kind, few_images, tmp_path):
    few_images(40)
    options = {"kind": kind, "batch_size": 4}
    sizes = {"size": 16, "grid": 4, "dim": 32, "codes": 64, "layers": 1, "steps": 1}
    train(**options, **sizes, out=tmp_path / "first")
    with pytest.raises(StudioError, match="name it with --init-from"):
        train(**options, model={"train": "decoder"}, steps=1, out=tmp_path / "none")
    tuned = {"train": "decoder", "perturbed_codes": 8}
    train(**options, model=tuned, init_from="first", steps=3, average=0.0, out=tmp_path / "tuned")
    before, after = (
        load_file(tmp_path / name / "model" / "diffusion_pytorch_model.safetensors") for name in ("first", "tuned")
    )
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed <= {"post_quant_conv", "decoder"} and "decoder" in changed
    assert "_name_or_path" not in json.loads((tmp_path / "tuned" / "model" / "config.json").read_text())
    first, again = (load(tmp_path / name, device="cpu") for name in ("first", "tuned"))
    assert torch.equal(first.encode(images(4)), again.encode(images(4)))
