"""How long a masked autoregressive model takes to sample continuous tokens, beside a plain textbook sampler."""

import torch

from studio.bench.models import MOST_IMAGES, check_counts, check_fits, parse_sizes
from studio.checkpoints.loading import pick_device
from studio.checks import check_integer, check_number
from studio.decoding.mar import MaskedAutoregressive, masked_autoregressive
from studio.errors import StudioError
from studio.models.mar import MAR
from studio.reference.mar import textbook_masked

_MOST = {
    "dim": 1 << 14,
    "depth": 256,
    "heads": 1024,
    "head_width": 1 << 14,
    "head_depth": 256,
    "tokens": 1 << 14,
    "steps": 1 << 14,
    "diffusion_steps": 1000,
}
SIZES = {
    "dim": 256,
    "depth": 6,
    "heads": 8,
    "head_width": 512,
    "head_depth": 4,
    "tokens": 64,
    "steps": 16,
    "diffusion_steps": 25,
}
_BUFFER = 16
_TOKEN_DIM = 16
_CLASSES = 10
_WEIGHT = 0.005


def bench_mar(
    *, random: str = "", guidance_scale: float = 3.0, batch: int = 2, device: str = "cpu", repeats: int = 3
) -> dict[str, float]:
    """Times a model of random weights, on the threads that torch is set to.

    Args:
        random: sizes as "dim=256,depth=6", those of `SIZES` where none are given: width, blocks and heads of encoder
            and of decoder, width and blocks of the head, tokens (a square number), and steps of both kinds. The buffer
            has 16 places, a token 16 numbers.
        batch: images at a time.
        repeats: runs of each side, in turn; the fastest counts.

    Returns:
        `{"seconds", "reference_seconds", "head_share"}`; the share of the seconds that the head takes.

    Raises:
        StudioError: for sizes that are none, do not fit together or into memory, for a number out of range, and for a
            device that is not there.
    """
    batch, guidance_scale = check_integer("batch", batch, 1, MOST_IMAGES), check_number("guidance", guidance_scale)
    check_counts(repeats=repeats)
    sizes = {**SIZES, **(parse_sizes(random, _MOST) if random else {})}
    place = pick_device(device)
    check_fits("A model of these sizes", _bytes(sizes, batch), place)
    model = _random_model(sizes)
    torch.nn.Module.to(model, place)
    settings = MaskedAutoregressive(steps=sizes["steps"], diffusion_steps=sizes["diffusion_steps"])
    settings.plan(model.num_tokens)
    condition = {"class_labels": torch.arange(batch, device=place) % _CLASSES}
    best: dict[str, float] = {}
    reference_seconds = float("inf")
    for _ in range(repeats):
        sides = []
        for sample in (masked_autoregressive, textbook_masked):
            generators = [torch.Generator().manual_seed(image) for image in range(batch)]
            sides.append(
                sample(model, condition, generators=generators, guidance_scale=guidance_scale, settings=settings)
            )
        ours, reference = (side.seconds for side in sides)
        reference_seconds = min(reference_seconds, sum(reference.values()))
        if not best or sum(ours.values()) < sum(best.values()):
            best = ours
    seconds = sum(best.values())
    return {"seconds": seconds, "reference_seconds": reference_seconds, "head_share": best["head"] / seconds}


def _bytes(sizes: dict[str, int], batch: int) -> int:
    """Bytes of weights, activations and attention, at least, in float32; both networks run with guidance."""
    rows, positions = 2 * batch, sizes["tokens"] + _BUFFER
    weights = 24 * sizes["depth"] * sizes["dim"] ** 2 + 5 * sizes["head_depth"] * sizes["head_width"] ** 2
    blocks = rows * positions * (positions * sizes["heads"] + 8 * sizes["dim"])
    return 4 * (weights + max(blocks, rows * positions * 8 * sizes["head_width"]))


def _random_model(sizes: dict[str, int]) -> MAR:
    side = round(sizes["tokens"] ** 0.5)
    if side * side != sizes["tokens"]:
        raise StudioError(f"tokens must be a square number, the grid's side squared, not {sizes['tokens']}.")
    torch.manual_seed(0)
    halves = {f"{half}_{name}": sizes[name] for half in ("encoder", "decoder") for name in ("dim", "depth", "heads")}
    model = MAR(
        **halves,
        grid_size=side,
        token_dim=_TOKEN_DIM,
        num_classes=_CLASSES,
        buffer_size=_BUFFER,
        head_width=sizes["head_width"],
        head_depth=sizes["head_depth"],
    ).eval()
    network = model.diffloss.net
    for layer in (*network.res_blocks, network.final_layer):
        torch.nn.init.normal_(layer.adaLN_modulation[1].weight, std=_WEIGHT)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=_WEIGHT)
    return model
