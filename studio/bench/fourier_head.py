"""Linear and Fourier output layers of TokenBridge's head, trained alike on frozen states (arXiv:2410.22269).

The transformer stays as it is. The head over dimensions is trained anew, once with each kind of output layer, from the
same random weights, on the same states of training images in the same order, and measured on images held out from
generators.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from studio.bench.models import load_generator
from studio.data.source import EMOJI, Examples, open_source
from studio.models.fourier_head import GAMMA, FourierHead
from studio.models.masked_autoencoder import take_rows
from studio.models.token_bridge import DimensionHead, TokenBridge
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.training.mar import LEAST_MASKED, masked_share

FREQUENCIES = (0, 12)
States = tuple[torch.Tensor, torch.Tensor]
"""States (n, C) and levels (n, D)."""
ASKED = 8
"""Masked cells of an image whose states are kept."""
_BATCH = 50
_SMOOTHED = 100


def bench_fourier_head(
    model: str = "emoji-bridge",
    *,
    frequencies: tuple[int, ...] = FREQUENCIES,
    steps: int = 1500,
    images: int = 4000,
    held_out: int = 500,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: str | None = None,
) -> dict:
    """Train heads and measure them.

    Args:
        model: a text-conditional `TokenBridgePipeline` over the emoji set.
        frequencies: one head each; 0 is the linear one.
        steps, batch_size, learning_rate: of AdamW, whose rate falls to zero over the last two fifths.
        images, held_out: how many images have their states kept, for training and for measuring.
        seed: of masks, weights and batches.

    Returns:
        `{"model", "steps", "seed", "rows"}`. A row has "frequencies" ("own" for the head that the model has),
        "parameters" (of the output layers), "nats" (mean cross-entropy of a level, held out), "train_nats" and
        "roughness" (distance of a distribution from itself smoothed, as in the paper; lower is smoother).

    Raises:
        StudioError: for another kind of model.
    """
    pipe = load_generator(model, device, TokenBridgePipeline, "emoji-bridge", dtype=torch.float32)
    source = open_source(EMOJI, pipe.image_tokenizer.config.sample_size)
    rng = np.random.default_rng(seed)
    train = frozen_states(pipe, source.train, images, rng)
    test = frozen_states(pipe, source.validation, held_out, rng)
    rows = [_row("own", pipe.transformer.head, train, test)]
    for number in frequencies:
        head = _new_head(pipe.transformer, number, seed)
        _train(head, *train, steps, batch_size, learning_rate, seed)
        rows.append(_row(number, head, train, test))
    return {"model": str(model), "steps": steps, "seed": seed, "rows": rows}


def _row(frequencies: int | str, head: DimensionHead, train: States, test: States) -> dict:
    nats, roughness = _measured(head, *test)
    return {
        "frequencies": frequencies,
        "parameters": sum(weight.numel() for weight in head.channel_heads.parameters()),
        "nats": nats,
        "train_nats": _measured(head, *(part[: len(test[0])] for part in train))[0],
        "roughness": roughness,
    }


@torch.no_grad()
def frozen_states(
    pipe: TokenBridgePipeline, examples: Examples, images: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (n, C) of masked cells of random images, as the head meets them in training, and their levels (n, D) in
    the order of sampling.
    """
    model, tokenizer = pipe.transformer, pipe.image_tokenizer
    chosen, total = rng.choice(len(examples), min(images, len(examples)), replace=False), model.num_tokens
    states, levels = [], []
    for start in tqdm(range(0, len(chosen), _BATCH), desc="states", unit="batch"):
        indices = chosen[start : start + _BATCH].tolist()
        tokens = tokenizer.encode(examples.images(indices).to(pipe.device)).flatten(1, 2)
        order = torch.from_numpy(rng.random((len(indices), total))).argsort(dim=1).to(pipe.device)
        masked = int(np.ceil(total * masked_share(rng)))
        hidden, visible = order[:, : min(ASKED, int(LEAST_MASKED * total))], order[:, masked:]
        buffer, _ = model.embed_condition(**pipe.condition(examples.captions(indices)))
        values = tokenizer.level_values.to(pipe.device)[tokens]
        states.append(model.decode(model.encode(values, visible, buffer), visible, hidden).flatten(0, 1))
        levels.append(take_rows(tokens, hidden).flatten(0, 1)[:, model.order])
    return torch.cat(states), torch.cat(levels)


def _new_head(model: TokenBridge, frequencies: int, seed: int) -> DimensionHead:
    """A head of the model's sizes with random weights, the same ones whatever the output layers are."""
    config = model.config
    sizes = (config.token_dim, config.levels, config.decoder_dim, config.head_width, config.head_depth)
    torch.manual_seed(seed)
    linear = DimensionHead(*sizes, config.head_heads, config.mlp_ratio)
    linear.apply(model._init_weights)
    linear.close_gates()
    head = copy.deepcopy(linear)
    if frequencies:
        layers = [FourierHead(config.head_width, config.levels, frequencies) for _ in range(config.token_dim)]
        head.channel_heads = torch.nn.ModuleList(layers)
    return head.to(model.device)


def _train(head, states, levels, steps, batch_size, learning_rate, seed):
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.02)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (0.4 * steps)))
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="head", unit="step"):
        rows = torch.from_numpy(rng.integers(len(states), size=batch_size))
        hidden = head.hidden(states[rows], levels[rows])
        logits = torch.stack([layer(hidden[:, index]) for index, layer in enumerate(head.channel_heads)], dim=1)
        loss = F.cross_entropy(logits.flatten(0, 1), levels[rows].flatten())
        for index, layer in enumerate(head.channel_heads):
            if isinstance(layer, FourierHead):
                loss = loss + GAMMA / len(head.channel_heads) * layer.roughness(hidden[:, index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        falls.step()


@torch.no_grad()
def _measured(head, states, levels):
    """Mean cross-entropy of a level, and roughness."""
    logits = torch.cat([head(*part) for part in zip(states.split(1000), levels.split(1000))])
    nats = F.cross_entropy(logits.flatten(0, 1), levels.flatten())
    return float(nats), roughness(logits.softmax(dim=-1).flatten(0, 1))


def roughness(distributions: torch.Tensor) -> float:
    """Mean over rows (n, m) of `sum_i 6 / (pi i)^2 |p - gauss_i * p|_2`, i from 1 to 100, on a circle (section 3.3)."""
    m = distributions.shape[1]
    distance = torch.arange(m, device=distributions.device)
    distance = torch.minimum(distance, m - distance).float()
    spectrum, found = torch.fft.fft(distributions), 0.0
    for spread in range(1, _SMOOTHED + 1):
        kernel = torch.exp(-(distance**2) / (2 * spread**2))
        smooth = torch.fft.ifft(spectrum * torch.fft.fft(kernel / kernel.sum())).real
        found += 6 / (torch.pi * spread) ** 2 * float((distributions - smooth).norm(dim=1).mean())
    return found
