"""Calls of a pipeline in a running batch: they join it and leave it between two calls of the transformer."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from studio.checks import check_integer, check_room
from studio.decoding.continuous import BatchImage, ContinuousBatch
from studio.decoding.continuous_speculative import SpeculativeBatch, SpeculativeImages
from studio.decoding.jacobi import Jacobi
from studio.decoding.speculative import Speculative
from studio.errors import StudioError
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput

if TYPE_CHECKING:
    from studio.pipelines.base import ConditionalPipeline


class BatchedCall(ABC):
    """A call in a `PipelineBatch`: the images of one prompt.

    Args:
        pipe: samples.
        prompts: the completed prompt of each image; None for classes.
        size: its images.
        seconds: by phase, those before the first step.

    Attributes:
        largest_batch: images that were in a call of the transformer with it, its own included, at most.
    """

    def __init__(self, pipe: "ConditionalPipeline", prompts: list[str] | None, size: int, seconds: dict) -> None:
        self.pipe, self.prompts, self.largest_batch, self.seconds = pipe, prompts, size, seconds
        self._began = time.perf_counter()

    @property
    @abstractmethod
    def sampled(self) -> int:
        """Tokens that all its images have; of tokens of D codes, those that all sampled codes would fill."""

    @property
    @abstractmethod
    def tokens(self) -> torch.Tensor:
        """The tokens of its images so far: the first (B, n), or all (B, L, D) of masked models."""

    @property
    def known(self) -> torch.Tensor | None:
        """Which of the tokens of masked models are sampled (B, L) bool, at least in part."""
        return None

    def end(self) -> None:
        """Its images are whole."""
        self.seconds["decode"] = time.perf_counter() - self._began

    def output(self) -> ImageTokenPipelineOutput:
        """What the pipeline would return for this call alone, with PIL images; the call must be whole."""
        began, tokens = time.perf_counter(), self.tokens
        images = self.pipe.decode_tokens(tokens)
        self.seconds["pixels"] = time.perf_counter() - began
        return ImageTokenPipelineOutput(images=images, tokens=tokens, stats=self.cost(), prompts=self.prompts)

    @abstractmethod
    def cost(self) -> DecodingStats:
        """What the call has cost so far."""

    def _cost(self, calls: int, tokens: int, accepted_length: float, decoding: str | None = None) -> DecodingStats:
        seconds = {**self.seconds, "total": sum(self.seconds.values())}
        return DecodingStats(calls, tokens, accepted_length, seconds, decoding=decoding)


class PipelineBatch(ABC):
    """A running batch; `new_batch` of a pipeline makes one.

    Args:
        pipe: samples.
        max_images: images at a time, at most.
    """

    def __init__(self, pipe: "ConditionalPipeline", max_images: int) -> None:
        self.pipe, self.max_images = pipe, check_integer("max_images", max_images, 1)
        self._calls: list[Any] = []

    @property
    @abstractmethod
    def size(self) -> int:
        """Images that are in it."""

    @property
    def room(self) -> int:
        """Images that may join."""
        return self.max_images - self.size

    @property
    def sizes(self) -> list[int]:
        """Images in each call of the transformer that a step makes."""
        return [self.size]

    def company(self, call: Any) -> int:
        """Images in the next call of the transformer for this call, its own included."""
        return self.size

    @torch.no_grad()
    def join(
        self,
        prompt: str | None = None,
        *,
        class_labels: int | str | None = None,
        generators: Sequence[torch.Generator],
        decoding: Any,
        **settings: Any,
    ) -> Any:
        """A call joins, with an image for each generator.

        Args:
            prompt, class_labels: as of a call of the pipeline, for one prompt or class.
            generators: one for each image.
            decoding: settings that may join: of LlamaGen those whose tokens are those of plain decoding
                (`Autoregressive`, `FastestExact`, or `Jacobi` with the coupling "seed") and those with drafts in trees
                (`Speculative`, `Lantern`, `LanternPlusPlus`), of masked models all but those of MAR with a drafter or a
                cache.
            settings: "guidance_scale", "temperature", "top_k" and "top_p" of a call of the pipeline.

        Returns:
            The `BatchedCall`.

        Raises:
            StudioError: arguments that the pipeline or the batch cannot use, or no room.
        """
        scale, sampling, decoding = self.pipe.check_call(
            prompt, class_labels=class_labels, decoding=decoding, **settings
        )
        if not getattr(decoding, "joins", False):
            raise StudioError(
                f"{type(decoding).__name__} decoding joins no running batch with these settings: call the pipeline."
            )
        check_room(self.room, len(generators))
        began = time.perf_counter()
        streams, condition, prompts = self.pipe.prepare_inputs(prompt, class_labels, len(generators), list(generators))
        seconds = {"text": time.perf_counter() - began}
        call = {"generators": streams, "sampling": sampling, "guidance_scale": scale, "settings": decoding}
        self._calls.append(self.start(condition, prompts, seconds, **call))
        return self._calls[-1]

    @abstractmethod
    def start(
        self, condition: dict[str, torch.Tensor], prompts: list[str] | None, seconds: dict[str, float], **call: Any
    ) -> BatchedCall:
        """The images of a call join."""

    @abstractmethod
    def leave(self, call: Any) -> None:
        """A call leaves before it is whole."""

    @abstractmethod
    def advance(self) -> list[Any]:
        """One call of the transformer; the calls that are whole now."""

    def step(self) -> list[Any]:
        """One call of the transformer; the calls that are whole now have left, and are returned."""
        for call in self._calls:
            call.largest_batch = max(call.largest_batch, self.company(call))
        whole = self.advance()
        for call in whole:
            call.end()
            self._calls.remove(call)
        return whole


class LlamaGenCall(BatchedCall):
    """A call in a `LlamaGenBatch`."""

    def __init__(
        self,
        pipe: "ConditionalPipeline",
        prompts: list[str] | None,
        seconds: dict,
        running: ContinuousBatch,
        images: list[BatchImage],
    ) -> None:
        super().__init__(pipe, prompts, len(images), seconds)
        self._running, self._images = running, images
        self._whole: dict[BatchImage, torch.Tensor] = {}

    @property
    def sampled(self) -> int:
        """As of `BatchedCall`."""
        return min(image.length for image in self._images)

    @property
    def tokens(self) -> torch.Tensor:
        """The first tokens (B, n) of its images, as many as all of them have."""
        count, batch = self.sampled, self._running
        kept = [self._whole[image] if image in self._whole else batch.tokens(image) for image in self._images]
        return torch.stack([tokens[:count] for tokens in kept])

    def keep(self, finished: Sequence[BatchImage]) -> bool:
        """Keeps the tokens of its images among those that are whole now; whether all its images are."""
        self._whole |= {image: self._running.tokens(image) for image in self.under_way() if image in finished}
        return len(self._whole) == len(self._images)

    def under_way(self) -> list[BatchImage]:
        """Its images that are not whole."""
        return [image for image in self._images if image not in self._whole]

    def leave(self) -> None:
        """Its images leave that are not whole."""
        for image in self.under_way():
            self._running.leave(image)

    def cost(self) -> DecodingStats:
        """As of `BatchedCall`; `decoding` says whether calls read guesses."""
        calls, tokens = [image.calls for image in self._images], sum(image.length for image in self._images)
        taken = "jacobi" if any(image.guessed for image in self._images) else "ar"
        return self._cost(max(calls), tokens, tokens / sum(calls), taken)


class SpeculativeCall(BatchedCall):
    """A call with drafts in a `LlamaGenBatch`."""

    def __init__(
        self,
        pipe: "ConditionalPipeline",
        prompts: list[str] | None,
        seconds: dict,
        running: SpeculativeBatch,
        images: SpeculativeImages,
    ) -> None:
        super().__init__(pipe, prompts, len(images.lengths), seconds)
        self._running, self._images = running, images

    @property
    def sampled(self) -> int:
        """As of `BatchedCall`."""
        return min(self._images.lengths)

    @property
    def tokens(self) -> torch.Tensor:
        """The first tokens (B, n) of its images, as many as all of them have."""
        return self._images.tokens[:, : self.sampled]

    def keep(self, finished: Sequence[BatchImage]) -> bool:
        """Whether all its images are whole."""
        return self._images.is_whole

    def leave(self) -> None:
        """Its images leave."""
        self._running.leave(self._images)

    def cost(self) -> DecodingStats:
        """As of `BatchedCall`."""
        images = self._images
        return self._cost(max(images.calls), sum(images.lengths), images.mean_accepted_length)


class LlamaGenBatch(PipelineBatch):
    """A running batch of a `LlamaGenPipeline`.

    A step is a call of the transformer for plain tokens and one for trees of drafts, each where there are such.
    """

    @cached_property
    def plain(self) -> ContinuousBatch:
        """The images without drafts."""
        return ContinuousBatch(self.pipe.transformer, max_images=self.max_images)

    @cached_property
    def drafting(self) -> SpeculativeBatch:
        """The images with drafts."""
        pipe: Any = self.pipe
        codebook = pipe.image_tokenizer.quantize.embedding.weight
        return SpeculativeBatch(pipe.transformer, max_images=self.max_images, codebook=codebook, drafter=pipe.drafter)

    @property
    def size(self) -> int:
        """As of `PipelineBatch`."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """As of `PipelineBatch`."""
        made = vars(self)  # a batch that nobody has joined is not made
        sizes = [len(self.plain.images) if "plain" in made else 0, self.drafting.size if "drafting" in made else 0]
        return [size for size in sizes if size]

    def company(self, call: LlamaGenCall | SpeculativeCall) -> int:
        """As of `PipelineBatch`."""
        return self.drafting.size if isinstance(call, SpeculativeCall) else len(self.plain.images)

    def start(
        self, condition: dict[str, torch.Tensor], prompts: list[str] | None, seconds: dict[str, float], **call: Any
    ) -> LlamaGenCall | SpeculativeCall:
        """As of `PipelineBatch`."""
        began = time.perf_counter()
        if isinstance(call["settings"], Speculative):
            joined = self.drafting.join(condition, **call)
            seconds["prefill"] = time.perf_counter() - began
            return SpeculativeCall(self.pipe, prompts, seconds, self.drafting, joined)
        settings = call.pop("settings")
        schedule, guesses = settings.guidance_schedule, isinstance(settings, Jacobi)
        images = self.plain.join(condition, **call, guidance_schedule=schedule, guesses=guesses)
        seconds["prefill"] = time.perf_counter() - began
        return LlamaGenCall(self.pipe, prompts, seconds, self.plain, images)

    def leave(self, call: LlamaGenCall | SpeculativeCall) -> None:
        """As of `PipelineBatch`."""
        call.leave()
        self._calls.remove(call)

    def advance(self) -> list[LlamaGenCall | SpeculativeCall]:
        """As of `PipelineBatch`."""
        made = vars(self)
        finished = self.plain.step() if "plain" in made else []
        if "drafting" in made:
            self.drafting.step()
        return [call for call in self._calls if call.keep(finished)]
