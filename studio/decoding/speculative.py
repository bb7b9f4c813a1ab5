"""Speculative decoding over image tokens: several tokens for a call of the target, with the target's own law.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192) over trees of drafts (SpecInfer,
arXiv:2305.09781). One round: a source drafts a tree below the last token, one call of the target reads all its nodes,
`verification` accepts a path, and the token behind it is drawn from what the tests leave of the target's law. Greedy,
the tokens are those of plain greedy decoding.

Pictures of a batch accept different lengths. Each goes on from its own place, leaves the batch when it is whole, and
uses its own generator alone, so that a batch equals its single calls. Null rows leave when no picture is guided any
more.

Deviations from LANTERN's code (arXiv:2410.03355), whose loop this is without relaxation: batches; no guidance, or an
interval of it; trees end with the picture, so that no round is wasted behind it; filters in the target's own order.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from studio.decoding.acceptance import Relaxation
from studio.decoding.autoregressive import Drawn, condition_rows, is_guided
from studio.decoding.drafts import DraftSource, Progress, Setting
from studio.decoding.guidance import Guidance
from studio.decoding.recycling import Recycling
from studio.decoding.sampling import Sampling, sample_rows
from studio.decoding.trees import Tree
from studio.decoding.verification import Verdict, verify, verify_greedy
from studio.errors import StudioError


@dataclass(frozen=True, kw_only=True)
class Speculative:
    """Settings of lossless speculative decoding.

    Args:
        drafts: where drafts come from: `Recycling()` and `NGram()` need no training, `DrafterDrafts(drafter)` does.
        filter_order: as of `Autoregressive`; of target and drafter alike.

    Errors: `StudioError` for what is no source of drafts.
    """

    drafts: DraftSource = Recycling()
    filter_order: str = "llamagen"

    def __post_init__(self):
        Sampling(order=self.filter_order)
        if not callable(getattr(self.drafts, "begin", None)):
            raise StudioError(
                f"drafts is a source such as Recycling(), NGram() or DrafterDrafts(drafter), not {self.drafts!r}."
            )

    def relaxation(self, codebook: torch.Tensor | None) -> Relaxation | None:
        """How acceptance is relaxed, given the stored code vectors (V, C); None: lossless."""
        return None


@dataclass
class SpeculativeDrawn(Drawn):
    """As of `Drawn`; `picture_calls` counts pictures over all calls of the model, `picture_tokens` what those drew."""

    picture_calls: int = 0
    picture_tokens: int = 0

    @property
    def mean_accepted_length(self) -> float:
        return self.picture_tokens / self.picture_calls


@torch.no_grad()
def speculative(
    model: torch.nn.Module,
    condition: dict,
    *,
    generators: list[torch.Generator],
    sampling: Sampling | None = None,
    guidance_scale: float = 1.0,
    cfg_interval: int = -1,
    settings: Speculative | None = None,
    codebook: torch.Tensor | None = None,
    on_token: Callable[[int, torch.Tensor], bool | None] | None = None,
    editable: bool = True,
) -> SpeculativeDrawn:
    """Draws all tokens of B pictures.

    Args:
        model, condition, generators, sampling, guidance_scale, cfg_interval: as of `autoregressive`.
        codebook: stored code vectors (V, C); needed by relaxed settings.
        on_token: called as (index, tokens (B, index + 1)) for each token that all pictures have reached; True stops.
        editable: whether `on_token` may write to the last of those tokens. A picture goes back to a token that it
            changes, so pictures that are whole stay in the batch until the others are.
    """
    settings = settings or Speculative()
    sampling = sampling or Sampling(order=settings.filter_order)
    began = time.perf_counter()
    run = _Run(model, condition, generators, sampling, guidance_scale, cfg_interval, settings, codebook)
    run.drawn.seconds["prefill"] = time.perf_counter() - began
    reporter = _Reporter(run, on_token, editable and on_token is not None)
    while not reporter.stopped() and not run.is_done:
        if not reporter.editable:
            run.retire()
        run.round()
    run.drawn.tokens = run.tokens[:, : reporter.reported] if on_token is not None else run.tokens
    run.drawn.seconds["decode"] = time.perf_counter() - began - run.drawn.seconds["prefill"]
    return run.drawn


class _Run:
    """The pictures of one call: tokens, lengths, caches. `pictures` are the numbers of those still in the batch."""

    def __init__(self, model, condition, generators, sampling, guidance_scale, cfg_interval, settings, codebook):
        self.model, self.sampling, self.generators = model, sampling, generators
        guided = is_guided(0, guidance_scale, cfg_interval)
        prefix, valid = condition_rows(model, condition, guided=guided)
        self.source, self.relaxation = settings.drafts, settings.relaxation(codebook)
        self.guidance = Guidance(guidance_scale, cfg_interval, 2 if guided else 1)
        batch, self.total, self.before = len(generators), model.num_tokens, prefix.shape[1]
        self.pictures = torch.arange(batch, device=prefix.device)
        self.tokens = torch.zeros(batch, self.total, dtype=torch.long, device=prefix.device)
        self.lengths = torch.ones_like(self.pictures)
        self.cache = model.new_tree_cache(len(prefix), self.source.nodes)
        states = model.prefill_states(prefix, valid, self.cache)
        self.cache.keep_all()
        self.states = None
        if self.source.uses_states:
            self.states = states.new_zeros(len(prefix), self.before + self.total, states.shape[2])
            self.states[:, : self.before] = states
        logits = self.guidance.combine(model.logits(states[:, -1:]), torch.zeros_like(self.lengths)[:, None])
        self.tokens[:, 0] = sampling.draw(logits[:, 0], generators)
        self.drawn = SpeculativeDrawn(self.tokens, 1, len(prefix), picture_calls=batch, picture_tokens=batch)
        self.drafting = self.source.begin(Setting(model, valid, batch, sampling, self.guidance))

    @property
    def is_done(self) -> bool:
        return bool((self.lengths >= self.total).all())

    def round(self) -> None:
        """One tree of drafts and one call of the target for each picture in the batch."""
        lengths = self.lengths[self.pictures]
        if self.guidance.is_over(int(self.lengths.min())):
            self._drop_null_rows()
        generators = [self.generators[picture] for picture in self.pictures.tolist()]
        room = (self.total - lengths - 1).clamp(min=0)
        tree = self.drafting.propose(Progress(self.tokens[self.pictures], lengths, room, generators, self.states))
        rows = self.guidance.rows
        positions = rows(self.before + lengths[:, None] - 1 + tree.depths)
        states = self.model.extend_tree(rows(tree.tokens), self.cache, positions, rows(tree.ancestors))
        logits = self.guidance.combine(self.model.logits(states), lengths[:, None] + tree.depths)
        verdict, following = self._verify(tree, logits, generators)
        counts = torch.where(lengths < self.total, verdict.accepted + 1, 0)
        self._write(tree, verdict, following, lengths, counts)
        if self.states is not None:
            self._keep_states(states, verdict, lengths, counts)
        self.cache.keep(rows(verdict.path), rows(counts))
        self.drafting.observe(tree, logits)
        self.drawn.target_calls += 1
        self.drawn.row_calls += len(states)
        self.drawn.picture_calls += int((counts > 0).sum())
        self.drawn.picture_tokens += int(counts.sum())

    def _verify(self, tree: Tree, logits: torch.Tensor, generators) -> tuple[Verdict, torch.Tensor]:
        """What is accepted, and the token (B,) behind it. A picture's random numbers do not depend on the others."""
        if self.sampling.greedy:
            verdict = verify_greedy(tree, logits, self.relaxation)
            last = verdict.last[:, None, None].expand(-1, 1, logits.shape[2])
            return verdict, logits.gather(1, last)[:, 0].argmax(dim=-1)
        uniforms = [torch.rand(self.source.nodes, generator=g, device=g.device) for g in generators]
        verdict = verify(tree, logits, torch.stack(uniforms).to(logits.device), self.sampling, self.relaxation)
        return verdict, sample_rows(verdict.law, generators)

    def _write(self, tree: Tree, verdict: Verdict, following, lengths, counts) -> None:
        """Puts the accepted drafts and the token behind them in their places."""
        drafts = tree.tokens.gather(1, verdict.path[:, 1:].clamp(min=0))
        block = torch.cat((drafts, following[:, None]), dim=1).scatter(1, verdict.accepted[:, None], following[:, None])
        steps = torch.arange(block.shape[1], device=block.device)
        pictures, places = torch.nonzero(steps < counts[:, None], as_tuple=True)
        self.tokens[self.pictures[pictures], lengths[pictures] + places] = block[pictures, places]
        self.lengths[self.pictures] = lengths + counts

    def _keep_states(self, states, verdict: Verdict, lengths, counts) -> None:
        """Stores the target's states at the roots and the accepted drafts."""
        steps = torch.arange(verdict.path.shape[1], device=states.device)
        kept = self.guidance.rows(steps < counts[:, None])
        rows, places = torch.nonzero(kept, as_tuple=True)
        path, positions = self.guidance.rows(verdict.path), self.guidance.rows(self.before + lengths - 1)
        self.states[rows, positions[rows] + places] = states[rows, path[rows, places]]

    def retire(self) -> None:
        """Goes on without the pictures that are whole."""
        stay = torch.nonzero(self.lengths[self.pictures] < self.total)[:, 0]
        if len(stay) == len(self.pictures):
            return
        rows = stay if self.guidance.streams == 1 else torch.cat((stay, stay + len(self.pictures)))
        self.pictures = self.pictures[stay]
        self._select(stay, rows)

    def _drop_null_rows(self) -> None:
        self.guidance.streams = 1
        rows = torch.arange(len(self.pictures), device=self.pictures.device)
        self._select(rows, rows)

    def _select(self, pictures: torch.Tensor, rows: torch.Tensor) -> None:
        self.cache.select_rows(rows)
        self.states = None if self.states is None else self.states[rows]
        self.drafting.select(pictures, rows)

    def rewind(self, lengths: torch.Tensor) -> None:
        """Goes back to the first `lengths` (B,) tokens of each picture; all are still in the batch."""
        self.lengths = lengths
        self.cache.crop_rows(self.guidance.rows(self.before + lengths - 1))
        self.drafting.rewind(lengths)


class _Reporter:
    """Tells `on_token` of tokens that all pictures have reached, and acts on what it changes."""

    def __init__(self, run: _Run, on_token, editable: bool):
        self.run, self.on_token, self.editable, self.reported = run, on_token, editable, 0

    def stopped(self) -> bool:
        """Reports what is new; whether to stop."""
        run = self.run
        while self.on_token is not None and self.reported < int(run.lengths.min()):
            index, self.reported = self.reported, self.reported + 1
            before = run.tokens[:, index].clone()
            if self.on_token(index, run.tokens[:, : index + 1]):
                return True
            changed = (run.tokens[:, index] != before) & (run.lengths > index + 1)
            if self.editable and changed.any():
                run.rewind(torch.where(changed, index + 1, run.lengths))
        return False
