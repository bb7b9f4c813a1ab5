"""How long a masked autoregressive model takes to sample continuous tokens, beside a plain textbook sampler."""

import torch

from studio.checkpoints.loading import pick_device
from studio.checks import shown
from studio.decoding.mar import MaskedAutoregressive, masked_autoregressive
from studio.errors import StudioError
from studio.models.mar import MAR
from studio.reference.mar import textbook_masked

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
        StudioError: for sizes that are none or do not fit together, for a number below 1, and for a device that is not
            there.
    """
    for name, value in (("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise StudioError(f"{name} must be at least 1, not {value}.")
    sizes = parse_sizes(random)
    device = pick_device(device)
    model = _random_model(sizes).to(device)
    settings = MaskedAutoregressive(steps=sizes["steps"], diffusion_steps=sizes["diffusion_steps"])
    settings.plan(model.num_tokens)
    condition = {"class_labels": torch.arange(batch, device=device) % _CLASSES}
    best, reference_seconds = None, float("inf")
    for _ in range(repeats):
        sides = []
        for sample in (masked_autoregressive, textbook_masked):
            generators = [torch.Generator().manual_seed(image) for image in range(batch)]
            sides.append(
                sample(model, condition, generators=generators, guidance_scale=guidance_scale, settings=settings)
            )
        ours, reference = (side.seconds for side in sides)
        reference_seconds = min(reference_seconds, sum(reference.values()))
        if best is None or sum(ours.values()) < sum(best.values()):
            best = ours
    seconds = sum(best.values())
    return {"seconds": seconds, "reference_seconds": reference_seconds, "head_share": best["head"] / seconds}


def parse_sizes(text: str) -> dict[str, int]:
    """Sizes by name out of a text such as "dim=256,depth=6"; those of `SIZES` for the rest."""
    sizes = dict(SIZES)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name.strip() not in SIZES or not value.strip().isdigit() or int(value) < 1:
            raise StudioError(f"Write sizes as {'=N,'.join(SIZES)}=N with whole numbers N above 0, not {shown(text)}.")
        sizes[name.strip()] = int(value)
    return sizes


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
