"""Speculative decoding in a running batch: calls join it between two rounds, and leave it when their images are whole.

Scheduling by iteration as in Orca (Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative
Models", OSDI 2022), for the rounds of `studio.decoding.speculative`. One call of the target reads the trees of all
images, whatever their prompts, guidance, temperatures, filters, drafts and tests, and however far each is. Each run
drafts and tests by itself: with its own random numbers, and its drafter's cache. So its tokens are those of a call
alone, with the compiled step bit by bit, elsewhere in float32 up to rounding of the logits.
"""

import time
from typing import Any

import torch

from studio import backends
from studio.checks import check_integer
from studio.decoding.autoregressive import Guidance
from studio.decoding.jacobi import Jacobi
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import Speculative, SpeculativeRounds, SpeculativeRun
from studio.errors import StudioError
from studio.models.llamagen import LlamaGen


class SpeculativeBatch(SpeculativeRounds):
    """A running batch.

    Args:
        model: a `LlamaGen` in evaluation mode.
        max_images: images at a time, at most.
        weights: as of `Autoregressive`; those of all settings.
        codebook, drafter: as of `speculative`.

    Raises:
        StudioError: `max_images` below 1.
    """

    def __init__(
        self,
        model: LlamaGen,
        *,
        max_images: int,
        weights: str = "auto",
        codebook: torch.Tensor | None = None,
        drafter: torch.nn.Module | None = None,
    ) -> None:
        self.max_images = check_integer("max_images", max_images, 1)
        super().__init__(backends.select(model, weights), model.new_batch_cache(2 * max_images, 0))
        self._model, self._weights, self._codebook, self._drafter = model, weights, codebook, drafter

    @property
    def size(self) -> int:
        """Images that are in it."""
        return sum(len(run.images) for run in self.runs)

    @torch.no_grad()
    def join(
        self,
        condition: dict,
        *,
        generators: list[torch.Generator],
        sampling: Sampling,
        guidance_scale: float = 1.0,
        settings: Speculative,
    ) -> SpeculativeRun:
        """Images join, with their first token; arguments as of `speculative`, for these images alone.

        Raises:
            StudioError: there is no room, or the settings have no rounds of drafts, or other weights.
        """
        room = self.max_images - self.size
        if len(generators) > room:
            raise StudioError(
                f"The batch has room for {room} images, not {len(generators)}: wait until others are done."
            )
        if isinstance(settings.drafts, Jacobi) or settings.weights != self._weights:
            raise StudioError(
                f"This batch is for drafts in trees, with weights {self._weights!r}: sample other settings in a call."
            )
        began = time.perf_counter()
        run = SpeculativeRun(
            self._model, self.network, lambda rows, nodes: self._model.new_prefix_cache(rows), condition,
            generators=generators, sampling=sampling,
            guidance=Guidance.of(guidance_scale, -1, settings.guidance_schedule, self._model), settings=settings,
            rule=settings.rule(self._codebook), drafter=self._drafter, total=self._model.num_tokens,
        )  # fmt: skip
        self._enter(run)
        run.sampled.seconds["prefill"] = time.perf_counter() - began
        return run

    def _enter(self, run: SpeculativeRun) -> None:
        cache: Any = self.cache
        cache.reserve(run.candidates.nodes, run.before + run.total)
        start = cache.rows
        cache.join(run.cache)
        run.rows, run.cache = [start + row for row in run.rows], cache
        self.runs.append(run)

    def leave(self, run: SpeculativeRun) -> None:
        """A run leaves, whole or not; it keeps its tokens."""
        self.runs.remove(run)
        self._release(run.rows)

    @torch.no_grad()
    def step(self) -> list[SpeculativeRun]:
        """One round of all images; the runs that are whole now have left, and are returned."""
        if any(not run.is_whole for run in self.runs):
            self.round()
        whole = [run for run in self.runs if run.is_whole]
        for run in whole:
            self.leave(run)
        for run in self.runs:
            self.retire(run)
        return whole
