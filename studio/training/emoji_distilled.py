"""Recipe of `emoji-distilled`, the student of `emoji-ar` in Distilled Decoding (arXiv:2412.17153).

Pairs of noise and tokens come from the teacher through the noise map, no pictures are read. The student sees a point of
the trajectory, some tokens in front of noise, and learns its end. What is exported is the teacher's pipeline with the
student in it.

Deviations from what the authors say of their training, whose code they did not release: both heads learn at all unknown
positions, so that the split between them can be chosen by measuring afterwards; the regression head learns squared
distance between code vectors, since a perceptual loss would need the weights of another network; no average of the
weights is kept, since the learning rate falls to zero.
"""

import torch
import torch.nn.functional as F
from torch import nn

from studio.checkpoints.loading import load
from studio.decoding.distilled import Distilled, spread_times, trajectory
from studio.evaluation.generators import evaluate_generator
from studio.models.distilled import DistilledStudent
from studio.training.export import copy_with_component, load_component
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.pair_cache import Pairs
from studio.training.recipe import Defaults, Recipe

TEACHER = "emoji-ar"
PAIRS, HELD_OUT_PAIRS = 16_384, 128
CALLS = 4
REGRESSION_WEIGHT = 1.0
NUM_LAYERS = 1
"""Layers that the student keeps of its teacher. The plan of the text encoder already says what is where; a layer is
left to let the noise choose among what it leaves open."""


class TrainableStudent(nn.Module):
    """A student and the codebook of its tokens."""

    def __init__(self, student: DistilledStudent, codebook: torch.Tensor):
        super().__init__()
        self.student = student
        self.register_buffer("codebook", codebook, persistent=False)

    def forward(self, noise, tokens, known, **condition):
        """Mean loss over the unknown positions of (B, n).

        Args:
            noise, tokens: the pair, (B, n, C) and (B, n).
            known: how many tokens each row is shown (B,).
            condition: as of `DistilledStudent.hidden_states`.
        """
        codes = self.codebook[tokens]
        vectors, logits = self.student(trajectory(noise, codes, known), known, **condition)
        by_logits = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        by_distance = (vectors - codes).square().sum(dim=-1)
        unknown = torch.arange(tokens.shape[1], device=tokens.device) >= known[:, None]
        return ((by_logits + REGRESSION_WEIGHT * by_distance) * unknown).sum() / unknown.sum().clamp(min=1)


class EmojiDistilled(Recipe):
    """Draws an emoji from words in one call: a student of `emoji-ar`, trained on its draws without pictures."""

    name = "emoji-distilled"
    data = "pairs of noise and tokens drawn from emoji-ar by the noise map, for captions of the training combinations"
    beginning = "the first layer of emoji-ar, its embeddings and heads"
    defaults = Defaults(steps=1600, batch_size=32, learning_rate=1e-3)

    def build(self, device):
        self.pairs = Pairs(load(TEACHER, device=device))
        self.tokens = self.pairs.tokens(PAIRS)
        codebook = self.pairs.codebook.to(device)
        student = DistilledStudent.from_teacher(self.pairs.pipe.transformer, codebook, num_layers=NUM_LAYERS)
        return TrainableStudent(student, codebook).to(device)

    def optimizers(self, module, learning_rate):
        return muon_and_adamw(module, hidden_matrices(module.student.layers), learning_rate)

    def batch(self, rng, batch_size, device):
        chosen = rng.integers(len(self.tokens), size=batch_size)
        n = self.tokens.shape[1]
        times = torch.tensor(spread_times(CALLS, n, DistilledStudent.horizon))
        known = times[torch.from_numpy(rng.integers(len(times), size=batch_size))]
        return {"known": known.to(device), "tokens": self.tokens[chosen].to(device), **self._inputs(chosen, device)}

    def _inputs(self, numbers, device):
        captions, noise = zip(*(self.pairs.inputs(int(number)) for number in numbers))
        noise = torch.stack([torch.from_numpy(part) for part in noise]).to(device)
        return {"noise": noise, **self.pairs.condition(list(captions))}

    def load(self, module, folder):
        load_component(module.student, folder, "student")

    def export(self, module, folder):
        copy_with_component(self.pairs.pipe.name_or_path, folder, "student", module.student)

    def quality(self, folder):
        """What `evaluate_generator` says of pictures drawn in one call, and what `agreement` says."""
        pipe = load(folder, device=self.pairs.pipe.device)
        pipe.set_progress_bar_config(disable=True)
        return {**evaluate_generator(pipe, decoding=Distilled(steps=1)), **self.agreement(pipe.student)}

    @torch.no_grad()
    def agreement(self, student):
        """How well one call of a student agrees with pairs that were never trained on.

        `token_agreement` is the share of tokens that the logits get right, `code_distance` the mean squared distance
        of the regressed vectors.
        """
        device = student.device
        numbers = range(PAIRS, PAIRS + HELD_OUT_PAIRS)
        expected = self.pairs.tokens(PAIRS + HELD_OUT_PAIRS)[PAIRS:]
        right, distance = 0, 0.0
        for part in torch.arange(HELD_OUT_PAIRS).split(32):
            inputs, tokens = self._inputs([numbers[i] for i in part.tolist()], device), expected[part].to(device)
            vectors, logits = student(inputs.pop("noise"), 0, **inputs)
            right += int((logits.argmax(dim=-1) == tokens).sum())
            distance += float((vectors - self.pairs.codebook.to(device)[tokens]).square().sum())
        return {"token_agreement": right / expected.numel(), "code_distance": distance / expected.numel()}
