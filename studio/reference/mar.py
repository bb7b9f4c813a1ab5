"""The slow, obviously right sampler of MAR (arXiv:2406.11838): the reference of tests and benchmarks.

Masks instead of positions, states of all tokens, twice the rows under guidance, and at each denoising step the whole
head anew, as the authors' sampler has it. It shares the model's modules with the fast path, but none of its shortcuts.
"""

import math
import time

import torch

from studio.decoding.counter_rng import PositionNoise, TokenIndex
from studio.decoding.mar import MaskedAutoregressive, MaskedOutput
from studio.models.mar import MAR


@torch.no_grad()
def textbook_masked(
    model: MAR,
    condition: dict,
    *,
    generators: list[torch.Generator],
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    settings: MaskedAutoregressive | None = None,
) -> MaskedOutput:
    """Samples all tokens of B images. Arguments as of `masked_autoregressive`."""
    settings = (settings or MaskedAutoregressive()).filled()
    assert settings.steps is not None and settings.diffusion_steps is not None
    began, transformer = time.perf_counter(), 0.0
    batch, total, size = len(generators), model.num_tokens, model.config.token_dim
    guided = guidance_scale != 1
    noise = PositionNoise.of(generators, size, model.device)
    order = noise.order(total)
    tokens = torch.zeros(batch, total, size, device=model.device)
    mask = torch.ones(batch, total, dtype=torch.bool, device=model.device)
    diffusion = model.diffloss.schedule(settings.diffusion_steps)
    for number in range(settings.steps):
        entered = time.perf_counter()
        now = int(mask[0].sum())
        left = max(1, min(now - 1, math.floor(total * math.cos(math.pi / 2 * (number + 1) / settings.steps))))
        kept = torch.zeros_like(mask)
        if number + 1 < settings.steps:
            kept.scatter_(1, order[:, :left], True)
        chosen = mask & ~kept
        scale = guidance_scale
        if settings.guidance_schedule == "linear":
            scale = 1 + (guidance_scale - 1) * (total - left) / total
        conditions = _conditions(model, condition, tokens, mask, guided)
        transformer += time.perf_counter() - entered
        z = torch.cat([part[chosen] for part in conditions])
        places = TokenIndex(*torch.nonzero(chosen, as_tuple=True))
        x, steps = noise.start(places), noise.steps(places, settings.diffusion_steps)
        for step in reversed(range(settings.diffusion_steps)):
            x = _denoised(model.diffloss.net, diffusion, x, step, z, scale, temperature * steps[step])
        tokens[chosen] = x
        mask = kept
    seconds = {"transformer": transformer, "head": time.perf_counter() - began - transformer}
    return MaskedOutput(tokens, settings.steps, settings.steps * batch * (2 if guided else 1), seconds)


def _conditions(model, condition: dict, tokens, mask, guided: bool) -> tuple[torch.Tensor, ...]:
    """States (B, L, C) of all tokens, under the condition and, if guided, under the null condition."""
    rows = 2 if guided else 1
    visible = torch.nonzero(~mask)[:, 1].view(len(mask), -1).repeat(rows, 1)
    doubled = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in condition.items()}
    buffer, _ = model.embed_condition(**doubled, drop=torch.arange(rows * len(mask), device=mask.device) >= len(mask))
    return model.decode(model.encode(tokens.repeat(rows, 1, 1), visible, buffer), visible).chunk(rows)


def _denoised(network, diffusion, x, step: int, z, scale: float, noise):
    """The state before x (n, D); conditions z are (n, C), or (2n, C) with the null ones behind."""
    both = x.repeat(len(z) // len(x), 1)
    times = torch.full((len(both),), int(diffusion.timestep_map[step]), device=x.device)
    predicted, logit = network(both, times, z).chunk(2, dim=1)
    if len(both) > len(x):
        conditional, null = predicted.chunk(2)
        predicted, logit = null + scale * (conditional - null), logit[: len(x)]
    start = diffusion.sqrt_recip_alphas_cumprod[step].item() * x
    start = start - diffusion.sqrt_recipm1_alphas_cumprod[step].item() * predicted
    if diffusion.limit is not None:
        start = start.clamp(-diffusion.limit, diffusion.limit)
    mean = diffusion.posterior_mean_coef1[step].item() * start + diffusion.posterior_mean_coef2[step].item() * x
    share = (logit + 1) / 2
    log_variance = share * diffusion.betas[step].log().item()
    log_variance = log_variance + (1 - share) * diffusion.posterior_log_variance_clipped[step].item()
    return mean if step == 0 else mean + (0.5 * log_variance).exp() * noise
