"""What makes drafts for speculative decoding: the protocol of a source, and what it gets to see.

A source is a frozen object of settings, a `Drafting` its state for one call of a pipeline. A picture's drafts may
depend on its own tokens, states and random numbers only, so that a batch equals its single calls, and never on the
uniform numbers of the tests.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from studio.decoding.guidance import Guidance
from studio.decoding.sampling import Sampling
from studio.decoding.trees import Tree


@dataclass
class Setting:
    """What a call is about: the target, valid prefix positions (rows, T) or None, and how its tokens are drawn.

    `guidance` follows the loop: its number of streams drops when null rows leave. `drafter` is the `Drafter` that
    belongs to the target, if any; `weights` says how the target is run, as of `Autoregressive`; `plan` is the target's
    for these rows, as of `LlamaGen.plan`.
    """

    model: torch.nn.Module
    valid: torch.Tensor | None
    batch: int
    sampling: Sampling
    guidance: Guidance
    drafter: torch.nn.Module | None = None
    weights: str = "plain"
    plan: torch.Tensor | None = None


@dataclass
class Progress:
    """How far B pictures are before a call of the target.

    Args:
        tokens: (B, N) int64, of which the first `lengths` (B,) are drawn; the last of those is the root.
        room: levels (B,) that a tree may have; more cannot be of use.
        generators: one per picture.
        states: the target's states (rows, T + N, dim) of all positions before the root; None unless the source asks.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    room: torch.Tensor
    generators: list[torch.Generator]
    states: torch.Tensor | None

    @property
    def roots(self) -> torch.Tensor:
        return self.tokens.gather(1, self.lengths[:, None] - 1)[:, 0]


class Drafting(Protocol):
    """The state of a source during one call.

    `nodes` bounds the nodes of its trees with the root; `uses_states` says whether it reads the target's states.
    """

    nodes: int
    uses_states: bool

    def propose(self, progress: Progress) -> Tree:
        """Trees below the roots, siblings distinct, at most `room` levels."""

    def observe(self, tree: Tree, logits: torch.Tensor) -> None:
        """Sees the target's guided logits (B, n, V) at the nodes of its trees."""

    def rewind(self, lengths: list[int]) -> None:
        """Some pictures go back to their first `lengths` tokens, of which the last one has changed."""

    def select(self, pictures: list[int], rows: list[int]) -> None:
        """Goes on with these pictures, and these rows of the batch, only."""


class DraftSource(Protocol):
    """Settings of a source.

    `drawn` says whether it draws siblings at random, from laws that its trees carry, where the target is not greedy.
    """

    drawn: bool

    def begin(self, setting: Setting) -> Drafting:
        """Fresh state for a call.

        Errors: `StudioError` when the source does not fit the target.
        """


class Memoryless:
    """A `Drafting` that keeps nothing from call to call; `nodes` and `propose` are left to its subclasses."""

    uses_states = False

    def observe(self, tree: Tree, logits: torch.Tensor) -> None:
        pass

    def rewind(self, lengths: list[int]) -> None:
        pass

    def select(self, pictures: list[int], rows: list[int]) -> None:
        pass
