"""Student of a LlamaGen in Distilled Decoding (arXiv:2412.17153): all tokens in one call.

Pairs of noise and tokens come from the teacher through the noise map, no images are read. The student sees a point of
the trajectory, some tokens in front of noise, and learns its end.

Deviations from what the authors say of their training, whose code they did not release: both heads learn at all unknown
positions, so that the split between them can be chosen by measuring afterwards; the regression head learns squared
distance between code vectors, since a perceptual loss would need the weights of another network.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from studio.checkpoints.loading import load
from studio.decoding.distilled import Distilled, spread_times, trajectory
from studio.models.distilled import DistilledStudent
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.training.companion import CompanionRecipe
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.pair_cache import Pairs
from studio.training.recipe import Defaults

CALLS = 4
REGRESSION_WEIGHT = 1.0
HELD_OUT_PAIRS = 128


class TrainableStudent(nn.Module):
    """A student and the codebook of its tokens."""

    codebook: torch.Tensor

    def __init__(self, student: DistilledStudent, codebook: torch.Tensor):
        super().__init__()
        self.student = student
        self.register_buffer("codebook", codebook, persistent=False)

    def forward(
        self, noise: torch.Tensor, tokens: torch.Tensor, known: torch.Tensor, **condition: torch.Tensor
    ) -> torch.Tensor:
        """Mean loss over the unknown positions of (B, n).

        Args:
            noise, tokens: the pair, (B, n, C) and (B, n).
            known: how many tokens each row is shown (B,).
            condition: as of `DistilledStudent.hidden_states`.
        """
        codes = self.codebook[tokens]
        vectors, logits = self.student(trajectory(noise, codes, known), known, **condition)
        by_logits = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view_as(tokens)
        by_distance = (vectors.float() - codes).square().sum(dim=-1)
        unknown = torch.arange(tokens.shape[1], device=tokens.device) >= known[:, None]
        return ((by_logits + REGRESSION_WEIGHT * by_distance) * unknown).sum() / unknown.sum().clamp(min=1)


class StudentRecipe(CompanionRecipe):
    """A student of a LlamaGen."""

    kind = "student"
    purpose = "Samples all tokens of an image in one call: a distilled student of a LlamaGen."
    origin = "the first layers of its teacher, its embeddings and heads"
    defaults = Defaults(steps=3000, batch_size=32, learning_rate=1e-3)
    takes = frozenset({"target", "layers"})
    model = {"pairs": 16_384}
    component, pipeline = "student", LlamaGenPipeline

    def build(self) -> torch.nn.Module:
        self.prepare()
        self.pairs = Pairs(self.pipe, self.source)
        every = self.pairs.tokens(self.model["pairs"] + HELD_OUT_PAIRS)
        self.tokens, self.unseen = every[:-HELD_OUT_PAIRS], every[-HELD_OUT_PAIRS:]
        codebook = self.pairs.codebook.to(self.device)
        layers = self.options.layers or 1
        student = DistilledStudent.from_teacher(self.pipe.transformer, codebook, num_layers=layers)
        return TrainableStudent(student, codebook).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        return muon_and_adamw(module, hidden_matrices(module.student.layers), learning_rate)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        tokens, first = (self.tokens, 0) if training else (self.unseen, len(self.tokens))
        chosen, n = rng.integers(len(tokens), size=size), tokens.shape[1]
        times = torch.tensor(spread_times(CALLS, n, DistilledStudent.horizon))
        known = times[torch.from_numpy(rng.integers(len(times), size=size))]
        return {"known": known, "tokens": tokens[chosen], **self._inputs(first + chosen)}

    def _inputs(self, numbers):
        subjects, noise = zip(*(self.pairs.inputs(int(number)) for number in numbers))
        condition = {name: value.cpu() for name, value in self.pairs.condition(subjects).items()}
        return {"noise": torch.from_numpy(np.stack(noise)), **condition}

    def samples(self, module: Any) -> torch.Tensor | None:
        """Validation images of the data, and those of one call."""
        count = min(8, len(self.source.validation))
        truth = self.source.validation.images(range(count)) / 2 + 0.5
        self.pipe.register_modules(student=module.student)
        made = self.measured(self.pipe, decoding=Distilled(steps=1), output_type="pt").images[:count]
        return torch.stack((truth, made.float().cpu()))

    def quality(self, folder: Path) -> dict:
        """What `evaluate_generator` says of images sampled in one call, and how well it agrees with unseen pairs."""
        from studio.evaluation.generators import evaluate_generator

        pipe = load(folder, device=self.device)
        pipe.set_progress_bar_config(disable=True)
        decoding = Distilled(steps=1)
        return {**evaluate_generator(pipe, decoding=decoding, source=self.source), **self.agreement(pipe.student)}

    @torch.no_grad()
    def agreement(self, student: DistilledStudent) -> dict[str, float]:
        """How well one call of a student agrees with pairs that were never trained on.

        `token_agreement` is the share of tokens that the logits get right, `code_distance` the mean squared distance
        of the regressed vectors.
        """
        right, distance, codebook = 0, 0.0, self.pairs.codebook.to(student.device)
        for part in torch.arange(HELD_OUT_PAIRS).split(32):
            inputs = self._inputs((len(self.tokens) + part).tolist())
            inputs = {
                name: value.to(student.device, student.dtype) if value.is_floating_point() else value.to(student.device)
                for name, value in inputs.items()
            }
            tokens = self.unseen[part].to(student.device)
            vectors, logits = student(inputs.pop("noise"), 0, **inputs)
            right += int((logits.argmax(dim=-1) == tokens).sum())
            distance += float((vectors.float() - codebook[tokens]).square().sum())
        return {"token_agreement": right / self.unseen.numel(), "code_distance": distance / self.unseen.numel()}
