"""Words first: a text encoder learns to plan the pictures that captions name, before a token model learns to draw.

A token model of small pictures reads most of its next token off the tokens before, so that little gradient reaches the
words. Guessing every code of the picture from the caption alone has no such short cut, and costs a hundredth of the
time. The guess of a region is linear in the state of one plan token, so that a token model finds what belongs into a
cell with one look at one state. (Tokens that only hold states are the registers of arXiv:2309.16588.)
"""

import math

import numpy as np
import torch
from einops import rearrange
from torch import nn
from tqdm.auto import tqdm

from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.schedule import Rates, learning_rate_factor

BATCH_SIZE = 256
LEARNING_RATE = 8e-3
WARMUP, COOLDOWN = 50, 0.4


class Guess(nn.Module):
    """Codes (B, grid_size ** 2, code_dim) of pictures, from the states of the last `plan_size ** 2` caption tokens."""

    def __init__(self, text_encoder, grid_size, plan_size, code_dim):
        super().__init__()
        self.text_encoder, self.plan_size, self.cells = text_encoder, plan_size, grid_size // plan_size
        self.head = nn.Linear(text_encoder.config.d_model, self.cells**2 * code_dim)

    def forward(self, input_ids, attention_mask):
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        number = self.plan_size**2
        places = attention_mask.sum(1, keepdim=True) - number + torch.arange(number, device=states.device)
        plan = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        sizes = {"r": self.plan_size, "i": self.cells, "j": self.cells}
        return rearrange(self.head(plan), "b (r c) (i j d) -> b (r i c j) d", **sizes)


def teach_words(text_encoder, codebook, captioned, plan_size, steps, seed):
    """Train a text encoder to guess pictures; deterministic by seed.

    Args:
        text_encoder: a T5 encoder, trained in place.
        codebook: the image tokenizer's code vectors (V, code_dim).
        captioned: function of a `numpy.random.Generator` and a number of pictures that draws
            `(input_ids, attention_mask, tokens)` of captions (B, T), padded on the right, and pictures (B, n).
        plan_size: side P of the grid of regions; every caption ends with P * P plan tokens, one a region in raster
            order. It must divide the side of the token grid.
        steps: steps of 256 captions.
        seed: of the captions that are drawn.

    Returns:
        The mean squared distance of a guessed code from the true one, over the last steps.
    """
    codebook = codebook.detach()
    grid_size = math.isqrt(captioned(np.random.default_rng(0), 1)[2].shape[1])
    guess = Guess(text_encoder, grid_size, plan_size, codebook.shape[1]).to(codebook.device)
    optimizers = muon_and_adamw(
        guess, hidden_matrices(text_encoder.encoder), LEARNING_RATE, tables=[text_encoder.shared.weight]
    )
    rates = Rates(optimizers)
    mean = None
    bar = tqdm(range(steps), desc="words", unit="step", mininterval=2)
    for step in bar:
        rates.scale(learning_rate_factor(step, steps, WARMUP, COOLDOWN))
        rng = np.random.default_rng((seed, step))
        input_ids, attention_mask, tokens = (part.to(codebook.device) for part in captioned(rng, BATCH_SIZE))
        loss = (guess(input_ids, attention_mask) - codebook[tokens]).square().sum(-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(guess.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach() if mean is None else mean.lerp(loss.detach(), 0.05)
        if step % 20 == 0:
            bar.set_postfix(distance=f"{float(mean):.4f}")
    return float("nan") if mean is None else float(mean)
