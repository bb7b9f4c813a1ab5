"""Speculative decoding over image tokens: several tokens for a call of the target, with the target's own distribution.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192) over trees of drafts (SpecInfer,
arXiv:2305.09781). One round: a source drafts a tree below the last token, one call of the target reads all its nodes,
`verification` accepts a path, and the token behind it is sampled from what the tests leave of the target's
distribution. Greedy, the tokens are those of plain greedy decoding.

Images of a batch accept different lengths. Each goes on from its own place, leaves the batch when it is whole, and
uses its own generator alone, so that a batch equals its single calls. Null rows leave when no image is guided any
more.

Deviations from LANTERN's code (arXiv:2410.03355), whose loop this is without relaxation: batches; no guidance, or an
interval of it; trees end with the image, so that no round is wasted behind it; filters in the target's own order.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from studio import backends
from studio.checks import shown
from studio.decoding.acceptance import Relaxation
from studio.decoding.autoregressive import Autoregressive, Guidance, condition_rows, is_guided
from studio.decoding.drafts import DraftSource, Progress, Setting
from studio.decoding.eagle import AutoDrafts
from studio.decoding.jacobi import Jacobi, jacobi
from studio.decoding.reporting import Reporter, SpeculativeOutput
from studio.decoding.sampling import Sampling, sample_rows
from studio.decoding.trees import Tree
from studio.decoding.verification import Verdict, verify, verify_greedy
from studio.errors import StudioError


@dataclass(frozen=True, kw_only=True)
class Speculative:
    """Settings of lossless speculative decoding.

    Args:
        drafts: where drafts come from: `TokenRecycling()` and `NGram()` need no training, `DrafterDrafts(drafter)`
            does;
            `AutoDrafts()` takes the drafter that belongs to the model, or recycles. `Jacobi()` takes the guesses of
            Jacobi decoding, whose loop it then is, with the tests of these settings.
        filter_order: as of `Autoregressive`; of target and drafter alike.
        weights: how the target is run, as of `Autoregressive`.

    Errors: `StudioError` for what is no source of drafts.
    """

    drafts: DraftSource | Jacobi = AutoDrafts()
    filter_order: str = "llamagen"
    weights: str = "auto"

    def __post_init__(self):
        Autoregressive(self.filter_order, self.weights)
        if isinstance(self.drafts, Jacobi):
            self._check_jacobi(self.drafts)
        elif not callable(getattr(self.drafts, "begin", None)):
            raise StudioError(
                f"drafts is a source such as TokenRecycling(), NGram(), Jacobi() or DrafterDrafts(drafter), not "
                f"{shown(self.drafts)}."
            )

    def _check_jacobi(self, drafts: Jacobi) -> None:
        if drafts.coupling == "seed":
            raise StudioError(
                'Jacobi(coupling="seed") compares guesses with tokens that share their noise, which leaves no test to '
                'relax: use coupling "maximal", "gumbel" or "none" as drafts, or Jacobi alone.'
            )
        if (drafts.filter_order, drafts.weights) != (Jacobi.filter_order, Jacobi.weights):
            raise StudioError(f"Give filter_order and weights to {type(self).__name__}, not to its Jacobi drafts.")

    @property
    def guesses(self) -> Jacobi:
        """The settings of Jacobi decoding that is tested by these settings, where `drafts` is that."""
        order, weights = self.filter_order, self.weights
        return replace(self.drafts, coupling=self.drafts.coupling or "maximal", filter_order=order, weights=weights)

    def relaxation(self, codebook: torch.Tensor | None) -> Relaxation | None:
        """How acceptance is relaxed, given the stored code vectors (V, C); None: lossless."""
        return None


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
    drafter: torch.nn.Module | None = None,
    num_tokens: int | None = None,
    on_token: Callable[[int, torch.Tensor], bool | None] | None = None,
    editable: bool = True,
) -> SpeculativeOutput:
    """Samples the tokens of B images.

    Args:
        model, condition, generators, sampling, guidance_scale, cfg_interval, num_tokens: as of `autoregressive`.
        codebook: stored code vectors (V, C); needed by relaxed settings.
        drafter: the `Drafter` that belongs to the model, for `AutoDrafts`.
        on_token: called as (index, tokens (B, index + 1)) for each token that all images have reached; True stops.
        editable: whether `on_token` may write to the last of those tokens. An image goes back to a token that it
            changes, so images that are whole stay in the batch until the others are.
    """
    settings = settings or Speculative()
    if isinstance(settings.drafts, Jacobi):
        return jacobi(
            model, condition, generators=generators, sampling=sampling, guidance_scale=guidance_scale,
            cfg_interval=cfg_interval, settings=settings.guesses, relaxation=settings.relaxation(codebook),
            num_tokens=num_tokens, on_token=on_token, editable=editable,
        )  # fmt: skip
    sampling = sampling or Sampling(order=settings.filter_order)
    began = time.perf_counter()
    run = _Run(
        model, condition, generators, sampling, guidance_scale, cfg_interval, settings, codebook, drafter, num_tokens
    )
    run.sampled.seconds["prefill"] = time.perf_counter() - began
    reporter = Reporter(run, on_token, editable)
    while not reporter.stopped() and not run.is_done:
        if not reporter.editable:
            run.retire()
        run.round()
    run.sampled.tokens = run.tokens[:, : reporter.reported] if on_token is not None else run.tokens
    run.sampled.seconds["decode"] = time.perf_counter() - began - run.sampled.seconds["prefill"]
    return run.sampled


class _Run:
    """The images of one call: tokens, `lengths` sampled, caches. `images` are the numbers of those in the batch."""

    def __init__(
        self,
        model,
        condition,
        generators,
        sampling,
        guidance_scale,
        cfg_interval,
        settings,
        codebook,
        drafter,
        num_tokens,
    ):
        self.model, self.sampling, self.generators = backends.select(model, settings.weights), sampling, generators
        guided = is_guided(0, guidance_scale, cfg_interval)
        prefix, valid = condition_rows(model, condition, guided=guided)
        self.relaxation = settings.relaxation(codebook)
        self.guidance = Guidance(guidance_scale, cfg_interval, 2 if guided else 1)
        batch, self.total, self.before = len(generators), num_tokens or model.num_tokens, prefix.shape[1]
        self.images, self.lengths = list(range(batch)), [1] * batch
        self.tokens = torch.zeros(batch, self.total, dtype=torch.long, device=prefix.device)
        setting = Setting(
            self.model,
            valid,
            batch,
            sampling,
            self.guidance,
            drafter,
            settings.weights,
            model.region_conditioning(prefix),
        )
        self.drafting = settings.drafts.begin(setting)
        self.cache = self.model.new_tree_cache(len(prefix), self.drafting.nodes)
        states = self.model.prefill_states(prefix, valid, self.cache)
        self.cache.keep_all()
        self.states = None
        if self.drafting.uses_states:
            self.states = states.new_zeros(len(prefix), self.before + self.total, states.shape[2])
            self.states[:, : self.before] = states
        logits = self.guidance.combine(self.model.logits(states[:, -1:]), self.tokens[:, :1])
        self.tokens[:, 0] = sampling.sample(logits[:, 0], generators)
        self.sampled = SpeculativeOutput(self.tokens, 1, len(prefix), image_calls=batch, image_tokens=batch)

    @property
    def is_done(self) -> bool:
        return min(self.lengths) >= self.total

    def round(self) -> None:
        """One tree of drafts and one call of the target for each image in the batch."""
        if self.guidance.is_over(min(self.lengths)):
            self._drop_null_rows()
        progress = self._progress()
        tree = self.drafting.propose(progress)
        rows, behind = self.guidance.rows, progress.lengths[:, None] + tree.depths
        ancestors = rows(tree.ancestors)
        states = self.model.extend_tree(rows(tree.tokens), self.cache, rows(self.before - 1 + behind), ancestors)
        logits = self.guidance.combine(self.model.logits(states), behind)
        verdict, following = self._verify(tree, logits, progress.generators)
        lengths = [self.lengths[image] for image in self.images]
        kept = [path if length < self.total else [] for path, length in zip(verdict.paths, lengths)]
        self._write(tree, kept, following.tolist())
        if self.states is not None:
            self._keep_states(states, kept, lengths)
        self.cache.keep(kept * self.guidance.streams)
        self.drafting.observe(tree, logits)
        self.sampled.target_calls += 1
        self.sampled.row_calls += len(states)
        self.sampled.image_calls += sum(map(bool, kept))
        self.sampled.image_tokens += sum(map(len, kept))

    def _progress(self) -> Progress:
        lengths = [self.lengths[image] for image in self.images]
        room = [max(0, self.total - length - 1) for length in lengths]
        tokens = self.tokens if len(self.images) == len(self.tokens) else self.tokens[self.images]
        generators = [self.generators[image] for image in self.images]
        return Progress(tokens, self._tensor(lengths), self._tensor(room), generators, self.states)

    def _tensor(self, numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, device=self.tokens.device)

    def _verify(self, tree: Tree, logits: torch.Tensor, generators) -> tuple[Verdict, torch.Tensor]:
        """What is accepted, and the token (B,) behind it. An image's random numbers do not depend on the others."""
        if self.sampling.greedy:
            verdict = verify_greedy(tree, logits, self.relaxation)
            return verdict, logits[list(range(len(logits))), verdict.last].argmax(dim=-1)
        uniforms = [torch.rand(self.drafting.nodes, generator=g, device=g.device) for g in generators]
        verdict = verify(tree, logits, torch.stack(uniforms), self.sampling, self.relaxation)
        return verdict, sample_rows(verdict.distribution, generators)

    def _write(self, tree: Tree, kept: list[list[int]], following: list[int]) -> None:
        """Puts the accepted drafts and the tokens behind them in their places."""
        images, places, tokens = [], [], []
        for image, path, drafted, last in zip(self.images, kept, tree.token_lists, following):
            if path:
                start, self.lengths[image] = self.lengths[image], self.lengths[image] + len(path)
                images += [image] * len(path)
                places += range(start, start + len(path))
                tokens += [*(drafted[node] for node in path[1:]), last]
        images, places, tokens = self._tensor([images, places, tokens])
        self.tokens[images, places] = tokens

    def _keep_states(self, states: torch.Tensor, kept: list[list[int]], lengths: list[int]) -> None:
        """Stores the target's states at the roots and the accepted drafts."""
        rows, nodes, places = [], [], []
        for row, (path, length) in enumerate(zip(kept * self.guidance.streams, lengths * self.guidance.streams)):
            start = self.before + length - 1
            rows += [row] * len(path)
            nodes += path
            places += range(start, start + len(path))
        rows, nodes, places = self._tensor([rows, nodes, places])
        self.states[rows, places] = states[rows, nodes]

    def retire(self) -> None:
        """Goes on without the images that are whole."""
        stay = [place for place, image in enumerate(self.images) if self.lengths[image] < self.total]
        count = len(self.images)
        if len(stay) < count:
            self.images = [self.images[place] for place in stay]
            self._select(stay, [stream * count + place for stream in range(self.guidance.streams) for place in stay])

    def _drop_null_rows(self) -> None:
        self.guidance.streams = 1
        rows = list(range(len(self.images)))
        self._select(rows, rows)

    def _select(self, images: list[int], rows: list[int]) -> None:
        self.cache.select_rows(rows)
        self.states = None if self.states is None else self.states[rows]
        self.drafting.select(images, rows)

    def rewind(self, lengths: list[int]) -> None:
        """Goes back to the first `lengths` tokens of each image; all are still in the batch."""
        self.lengths = lengths
        self.cache.crop_rows([self.before + length - 1 for length in lengths] * self.guidance.streams)
        self.drafting.rewind(lengths)
