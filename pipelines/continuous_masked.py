"""Calls of pipelines of masked models in a running batch, where each takes its own steps."""

import time
from typing import TYPE_CHECKING, Any

import torch

from studio.decoding.masked_runs import MaskedRun, MaskedSampler
from studio.pipelines.continuous import BatchedCall, PipelineBatch
from studio.pipelines.output import DecodingStats

if TYPE_CHECKING:
    from studio.pipelines.base import ConditionalPipeline


class MaskedCall(BatchedCall):
    """A call in a `MaskedBatch`."""

    def __init__(
        self, pipe: "ConditionalPipeline", prompts: list[str] | None, seconds: dict[str, float], run: MaskedRun
    ) -> None:
        super().__init__(pipe, prompts, len(run.tokens), seconds)
        self.run = run

    @property
    def sampled(self) -> int:
        """As of `BatchedCall`."""
        return self.run.sampled

    @property
    def tokens(self) -> torch.Tensor:
        """All tokens (B, L, D) of its images."""
        return self.run.tokens

    @property
    def known(self) -> torch.Tensor:
        """As of `BatchedCall`."""
        return self.run.known

    def cost(self) -> DecodingStats:
        """As of `BatchedCall`."""
        run = self.run
        return self._cost(run.number, run.total, run.final / max(1, run.number))


class MaskedBatch(PipelineBatch):
    """A running batch of a pipeline of a masked model, which its `sampler` samples."""

    def __init__(self, pipe: "ConditionalPipeline", sampler: MaskedSampler[Any], max_images: int) -> None:
        super().__init__(pipe, max_images)
        self.sampler = sampler

    @property
    def size(self) -> int:
        """As of `PipelineBatch`."""
        return sum(len(call.tokens) for call in self._calls)

    def start(
        self, condition: dict[str, torch.Tensor], prompts: list[str] | None, seconds: dict[str, float], **call: Any
    ) -> MaskedCall:
        """As of `PipelineBatch`."""
        began = time.perf_counter()
        run = self.sampler.start(condition, **call)
        seconds["prefill"] = time.perf_counter() - began
        return MaskedCall(self.pipe, prompts, seconds, run)

    def leave(self, call: MaskedCall) -> None:
        """As of `PipelineBatch`."""
        self._calls.remove(call)

    def advance(self) -> list[MaskedCall]:
        """As of `PipelineBatch`."""
        if self._calls:
            self.sampler.step([call.run for call in self._calls])
        return [call for call in self._calls if call.run.is_whole]
