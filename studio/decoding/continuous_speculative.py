"""Speculative decoding in a running batch: calls join it between two rounds, and leave it when their images are whole.

Scheduling by iteration as in Orca (Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative
Models", OSDI 2022), for the rounds of `studio.decoding.speculative`. One call of the target reads the trees of all
images, whatever their prompts, guidance, temperatures, filters, drafts and tests, and however far each is. Images whose
settings are equal are one `SpeculativeRun`, which makes and tests their drafts together; others draft by themselves. An
image has its own random numbers. So its tokens are those of a call alone, with the compiled step bit by bit, elsewhere
in float32 up to rounding of the logits.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from studio import backends
from studio.checks import check_integer, check_room
from studio.decoding.autoregressive import Guidance
from studio.decoding.jacobi import Jacobi
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import Speculative, SpeculativeRounds, SpeculativeRun
from studio.errors import StudioError
from studio.models.llamagen import LlamaGen


@dataclass(eq=False)
class SpeculativeImages:
    """The images of one call, in a batch or whole.

    Attributes:
        run: samples them, with others whose settings are equal; `None` when they have left.
        numbers: theirs in the run.
        total: tokens of an image.
        tokens: (B, N), of which the first `lengths` (B) are sampled.
        calls: of the target for each image, the first included.
    """

    run: SpeculativeRun | None
    numbers: list[int]
    total: int
    tokens: torch.Tensor = field(init=False)
    lengths: list[int] = field(init=False)
    calls: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.update()

    def update(self) -> None:
        """Takes over what the run has sampled."""
        assert self.run is not None
        self.tokens = self.run.tokens[self.numbers]
        self.lengths = [self.run.lengths[number] for number in self.numbers]
        self.calls = [self.run.calls[number] for number in self.numbers]

    @property
    def is_whole(self) -> bool:
        """Whether all images are complete."""
        return min(self.lengths) >= self.total

    @property
    def mean_accepted_length(self) -> float:
        """Tokens of an image per call of the target."""
        return sum(self.lengths) / sum(self.calls)


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
        self.members: list[SpeculativeImages] = []

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
    ) -> SpeculativeImages:
        """Images join, with their first token; arguments as of `speculative`, for these images alone.

        Raises:
            StudioError: there is no room, or the settings have no rounds of drafts, or other weights.
        """
        check_room(self.max_images - self.size, len(generators))
        if isinstance(settings.drafts, Jacobi) or settings.weights != self._weights:
            raise StudioError(
                f"This batch is for drafts in trees, with weights {self._weights!r}: sample other settings in a call."
            )
        run = SpeculativeRun(
            self._model, self.network, lambda rows, nodes: self._model.new_prefix_cache(rows), condition,
            generators=generators, sampling=sampling,
            guidance=Guidance.of(guidance_scale, -1, settings.guidance_schedule, self._model), settings=settings,
            rule=settings.rule(self._codebook), drafter=self._drafter, total=self._model.num_tokens,
        )  # fmt: skip
        same, images = next((each for each in self.runs if each.is_like(run)), None), run.images
        if same is not None:
            run.settle()
        self._store(run)
        if same is None:
            self.runs.append(run)
        else:
            same.absorb(run)
            run, images = same, list(range(len(same.lengths) - len(images), len(same.lengths)))
        self.members.append(SpeculativeImages(run, list(images), run.total))
        return self.members[-1]

    def _store(self, run: SpeculativeRun) -> None:
        """Its prefix goes on in the cache of the batch."""
        cache: Any = self.cache
        cache.reserve(run.candidates.nodes, run.before + run.total)
        start = cache.rows
        cache.join(run.cache)
        run.rows, run.cache = [start + row for row in run.rows], cache

    def leave(self, images: SpeculativeImages) -> None:
        """Images leave, whole or not; they keep their tokens."""
        run = images.run
        if run is None:
            return
        self.members.remove(images)
        images.run = None
        others = [each for each in self.members if each.run is run]
        if not others:
            self.runs.remove(run)
            self._release(run.rows)
            return
        stay = [place for place, number in enumerate(run.images) if number not in images.numbers]
        self._select(run, stay, run.places(stay))
        now = run.forget(images.numbers)
        for each in others:
            each.numbers = [now[number] for number in each.numbers]

    @torch.no_grad()
    def step(self) -> list[SpeculativeImages]:
        """One round of all images; those of calls that are whole now have left, and are returned."""
        if any(not run.is_whole for run in self.runs):
            self.round()
        for each in self.members:
            each.update()
        whole = [each for each in self.members if each.is_whole]
        for each in whole:
            self.leave(each)
        for run in self.runs:
            self.retire(run)
        return whole
