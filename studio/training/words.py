"""Words first: a text encoder learns to guess the pictures that captions name, before a token model learns to draw.

A token model of small pictures reads most of its next token off the tokens before, so that little gradient reaches the
words. Guessing every code of the picture from the caption alone has no such short cut, and costs a hundredth of the
time. The guess is linear in the mean of the encoder's states, so that what the words look like is easy to read there.
"""

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.schedule import Rates, learning_rate_factor

BATCH_SIZE = 256
LEARNING_RATE = 8e-3
WARMUP, COOLDOWN = 50, 0.4


class Guess(nn.Module):
    """Codes (B, n, code_dim) of pictures, from the mean state of their captions."""

    def __init__(self, text_encoder, num_tokens, code_dim):
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(text_encoder.config.d_model, num_tokens * code_dim)
        self.shape = (num_tokens, code_dim)

    def forward(self, input_ids, attention_mask):
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return self.head((states * weights).sum(1)).unflatten(-1, self.shape)


def teach_words(text_encoder, codebook, captioned, steps, seed):
    """Train a text encoder to guess pictures; deterministic by seed.

    Args:
        text_encoder: a T5 encoder, trained in place.
        codebook: the image tokenizer's code vectors (V, code_dim).
        captioned: function of a `numpy.random.Generator` and a number of pictures that draws
            `(input_ids, attention_mask, tokens)` of captions (B, T) and pictures (B, n).
        steps: steps of 256 captions.
        seed: of the captions that are drawn.

    Returns:
        The mean squared distance of a guessed code from the true one, over the last steps.
    """
    codebook = codebook.detach()
    guess = Guess(text_encoder, captioned(np.random.default_rng(0), 1)[2].shape[1], codebook.shape[1])
    guess = guess.to(codebook.device)
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
