"""Calls of a `LlamaGenPipeline` in a running batch: they join it and leave it between two calls of the transformer."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from studio.decoding.continuous import BatchImage, ContinuousBatch
from studio.decoding.jacobi import Jacobi
from studio.errors import StudioError
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput

if TYPE_CHECKING:
    from studio.pipelines.llamagen import LlamaGenPipeline


class BatchedCall:
    """A call in a `PipelineBatch`: the images of one prompt.

    Attributes:
        prompts: the completed prompt of each image; None for classes.
        largest_batch: images that were in a call of the transformer with it, its own included, at most.
    """

    def __init__(self, batch: "PipelineBatch", images: list[BatchImage], prompts: list[str] | None, seconds: dict):
        self._batch, self._images, self.prompts, self._seconds = batch, images, prompts, seconds
        self._began = time.perf_counter()
        self._whole: dict[BatchImage, torch.Tensor] = {}
        self.largest_batch = len(images)

    @property
    def sampled(self) -> int:
        """Tokens that all its images have."""
        return min(image.length for image in self._images)

    @property
    def tokens(self) -> torch.Tensor:
        """The first tokens (B, n) of its images, as many as all of them have."""
        count, batch = self.sampled, self._batch.running
        kept = [self._whole[image] if image in self._whole else batch.tokens(image) for image in self._images]
        return torch.stack([tokens[:count] for tokens in kept])

    def finish(self, image: BatchImage) -> bool:
        """Keeps the tokens of a whole image; whether all its images are whole now."""
        self._whole[image] = self._batch.running.tokens(image)
        if done := len(self._whole) == len(self._images):
            self._seconds["decode"] = time.perf_counter() - self._began
        return done

    def under_way(self) -> list[BatchImage]:
        """Its images that are not whole."""
        return [image for image in self._images if image not in self._whole]

    def output(self) -> ImageTokenPipelineOutput:
        """What the pipeline would return for this call alone, with PIL images; the call must be whole."""
        began, tokens = time.perf_counter(), self.tokens
        images = self._batch.pipe.decode_tokens(tokens)
        self._seconds["pixels"] = time.perf_counter() - began
        return ImageTokenPipelineOutput(images=images, tokens=tokens, stats=self.cost(), prompts=self.prompts)

    def cost(self) -> DecodingStats:
        """What the call has cost so far."""
        calls, tokens = [image.calls for image in self._images], sum(image.length for image in self._images)
        seconds = {**self._seconds, "total": sum(self._seconds.values())}
        return DecodingStats(max(calls), tokens, tokens / sum(calls), seconds)


class PipelineBatch:
    """A running batch; `LlamaGenPipeline.new_batch` makes one.

    Args:
        pipe: samples.
        max_images: images at a time, at most.
    """

    def __init__(self, pipe: "LlamaGenPipeline", max_images: int) -> None:
        self.pipe, self.running = pipe, ContinuousBatch(pipe.transformer, max_images=max_images)
        self._calls: list[BatchedCall] = []

    @property
    def room(self) -> int:
        """Images that may join."""
        return self.running.room

    @torch.no_grad()
    def join(
        self,
        prompt: str | None = None,
        *,
        class_labels: int | str | None = None,
        generators: Sequence[torch.Generator],
        decoding: Any,
        **settings: Any,
    ) -> BatchedCall:
        """A call joins, with an image for each generator.

        Args:
            prompt, class_labels: as of a call of the pipeline, for one prompt or class.
            generators: one for each image.
            decoding: settings whose tokens are those of plain decoding: `Autoregressive`, `FastestExact`, or `Jacobi`
                with the coupling "seed".
            settings: "guidance_scale", "temperature", "top_k" and "top_p" of a call of the pipeline.

        Raises:
            StudioError: arguments that the pipeline or the batch cannot use.
        """
        scale, sampling, decoding = self.pipe.check_call(
            prompt, class_labels=class_labels, decoding=decoding, **settings
        )
        if not getattr(decoding, "plain_tokens", False):
            raise StudioError(f"{type(decoding).__name__} decoding joins no running batch: call the pipeline.")
        began = time.perf_counter()
        subjects = (prompt, class_labels)
        streams, condition, prompts = self.pipe.prepare_inputs(*subjects, len(generators), list(generators))
        encoded = time.perf_counter()
        guesses = isinstance(decoding, Jacobi)
        images = self.running.join(
            condition,
            generators=streams,
            sampling=sampling,
            guidance_scale=scale,
            guidance_schedule=decoding.guidance_schedule,
            guesses=guesses,
        )
        seconds = {"text": encoded - began, "prefill": time.perf_counter() - encoded}
        self._calls.append(BatchedCall(self, images, prompts, seconds))
        return self._calls[-1]

    def leave(self, call: BatchedCall) -> None:
        """A call leaves before it is whole."""
        for image in call.under_way():
            self.running.leave(image)
        self._calls.remove(call)

    def step(self) -> list[BatchedCall]:
        """One call of the transformer; the calls that are whole now have left, and are returned."""
        size, whole = len(self.running.images), []
        finished = set(self.running.step())
        for call in list(self._calls):
            call.largest_batch = max(call.largest_batch, size)
            if any([call.finish(image) for image in call.under_way() if image in finished]):
                self._calls.remove(call)
                whole.append(call)
        return whole
