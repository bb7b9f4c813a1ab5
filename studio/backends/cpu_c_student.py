"""A student of Distilled Decoding in C (`native.c`) for CPUs: its blocks are one call, its logits another.

Padding in front of all captions of a batch is left out. Results at a position depend neither on that nor on the batch.
"""

from typing import Any

import torch

from studio.backends.cpu_c import NativeBlocks, NativeProduct, can_run
from studio.backends.model_backend import ModelBackend
from studio.models.distilled import DistilledStudent
from studio.models.kv_cache import KVCache


def can_distil(student: DistilledStudent) -> bool:
    """Whether a student runs in C on this machine; see `studio.backends.cpu_c.can_run`."""
    return can_run(student, student.config.vocab_size)


class NativeStudent(ModelBackend[DistilledStudent]):
    """The calls of a `DistilledStudent` for which `can_distil` is true; results differ by rounding only."""

    @torch.no_grad()
    def __init__(self, student: DistilledStudent):
        super().__init__(student)
        self._blocks = NativeBlocks(student, norm=None)
        self._output = NativeProduct(student.output.weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden_states(
        self, vectors: torch.Tensor, known: int | torch.Tensor, **condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DistilledStudent.hidden_states`."""
        student = self.model
        x, valid, context = student.inputs(vectors, known, **condition)
        length, first, visible = x.shape[1], 0, None
        if valid is not None:
            first = int(valid.any(dim=0).int().argmax())
            mask = student.prefix_mask(valid, length)
            visible = None if mask is None else mask[:, 0, first:, first:]
        x = x[:, first:]
        attention: Any = student.layers[0].attention
        cache = KVCache(
            num_layers=len(student.layers),
            rows=len(x),
            num_kv_heads=attention.num_kv_heads,
            max_length=x.shape[1],
            head_dim=attention.head_dim,
        )
        positions = torch.arange(first, length).expand(len(x), -1)
        return self._blocks(x, cache, positions, visible)[:, -vectors.shape[1] :], context

    def classify(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """As `DistilledStudent.classify`."""
        return self._output(self.model.norm(hidden))
