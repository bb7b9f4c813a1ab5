"""Speculative decoding over image tokens: several tokens for a call of the target, with the target's own distribution.

"Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192) over trees of drafts (SpecInfer,
arXiv:2305.09781). One round: a candidate generator drafts a tree below the last token, one call of the target reads all
its nodes, a path is accepted (`studio.decoding.verification`), and the token behind it is sampled from the residual
distribution. Greedy, the tokens are those of plain greedy decoding. Other rules of acceptance, such as LANTERN's, are
those of settings derived from `Speculative`.

Images of a batch accept different lengths. Each goes on from its own place, leaves the batch when it is complete, and
uses its own generator alone, so results do not depend on batch size. The unconditional rows leave when no image is
guided any more. So several calls may share those of the target too, as in a running batch (`SpeculativeRounds`).

Deviations from LANTERN's code (arXiv:2410.03355), whose loop this is: batches; no guidance, or an interval of it; trees
end with the image, so that no round is wasted behind it; filters in the target's own order.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from studio import backends
from studio.checks import shown
from studio.decoding.autoregressive import Autoregressive, Guidance, condition_rows
from studio.decoding.drafts import DraftContext, Drafts, Progress
from studio.decoding.jacobi import Jacobi, jacobi
from studio.decoding.sampling import KnownTokens, OnStep, Reporter, Sampling, SpeculativeOutput, sample_rows
from studio.decoding.trees import Tree
from studio.decoding.verification import AcceptanceRule, Lossless, VerifyResult, verify, verify_greedy
from studio.errors import StudioError
from studio.models.kv_cache import TreeCache
from studio.models.llamagen import LlamaGen

_SHARED = ("filter_order", "weights", "guidance_schedule")
"""What Jacobi drafts take from the settings that they belong to."""


@dataclass(frozen=True, kw_only=True)
class Speculative:
    """Settings of lossless speculative decoding.

    Args:
        drafts: where drafts come from. `Jacobi()` takes the guesses of Jacobi decoding, whose loop it then is, with the
            tests of these settings. `AutoDrafts()` takes the drafter that belongs to the model, or recycles;
            `DrafterDrafts(drafter)` takes another; `TokenRecycling()` and `NGram()` need no training.
        filter_order: as of `Autoregressive`; of target and drafter alike.
        weights, guidance_schedule: of the target, as of `Autoregressive`.

    Raises:
        StudioError: for what makes no drafts.
    """

    drafts: Drafts | Jacobi = Jacobi()
    filter_order: str = "llamagen"
    weights: str = "auto"
    guidance_schedule: str | None = None

    def __post_init__(self) -> None:
        Autoregressive(self.filter_order, self.weights, self.guidance_schedule)
        if isinstance(self.drafts, Jacobi):
            self._check_jacobi(self.drafts)
        elif not callable(getattr(self.drafts, "candidate_generator", None)):
            raise StudioError(
                f"drafts is TokenRecycling(), NGram(), Jacobi() or DrafterDrafts(drafter), for example, not "
                f"{shown(self.drafts)}."
            )

    def _check_jacobi(self, drafts: Jacobi) -> None:
        if drafts.coupling == "seed":
            raise StudioError(
                'Jacobi(coupling="seed") compares guesses with tokens that share their noise, which leaves no test to '
                'relax: use coupling "maximal", "gumbel" or "none" as drafts, or Jacobi alone.'
            )
        if any(getattr(drafts, name) != getattr(Jacobi, name) for name in _SHARED):
            raise StudioError(f"Give {', '.join(_SHARED)} to {type(self).__name__}, not to its Jacobi drafts.")

    @property
    def joins(self) -> bool:
        """Whether requests may join a running batch, which has rounds of drafts, and runs the target one way."""
        return not isinstance(self.drafts, Jacobi) and self.weights == "auto"

    @property
    def guesses(self) -> Jacobi:
        """The settings of Jacobi decoding that is tested by these settings, where `drafts` is that."""
        shared: dict[str, Any] = {name: getattr(self, name) for name in _SHARED}
        assert isinstance(self.drafts, Jacobi)
        return replace(self.drafts, coupling=self.drafts.coupling or "maximal", **shared)

    def rule(self, codebook: torch.Tensor | None) -> AcceptanceRule:
        """How drafts are accepted, given the stored code vectors (V, C)."""
        return Lossless()


@torch.no_grad()
def speculative(
    model: LlamaGen,
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
    on_step: OnStep | None = None,
    editable: bool = True,
    known: KnownTokens | None = None,
) -> SpeculativeOutput:
    """Samples the tokens of B images.

    Args:
        model, condition, generators, sampling, guidance_scale, cfg_interval, num_tokens: as of `autoregressive`.
        codebook: stored code vectors (V, C); needed by relaxed settings.
        drafter: the `Drafter` that belongs to the model, for `AutoDrafts`.
        on_step: called as (index, tokens (B, index + 1)) for each token that all images have reached; True stops.
        editable: whether `on_step` may write to the last of those tokens. An image goes back to a token that it
            changes, so images that are complete stay in the batch until the others are.
        known: as of `jacobi`, for lossless settings.

    Returns:
        The tokens and what they cost.

    Raises:
        StudioError: known tokens with relaxed settings, which may replace them.
    """
    settings = settings or Speculative()
    rule = settings.rule(codebook)
    if known is not None and not isinstance(rule, Lossless):
        raise StudioError(
            "A relaxed test may replace tokens that are to be kept: edit with Speculative, Jacobi or plain."
        )
    if isinstance(settings.drafts, Jacobi):
        relaxation: Any = None if type(rule) is Lossless else rule
        if relaxation is not None and not hasattr(rule, "borrowed_mass"):
            raise StudioError(f"{type(settings).__name__} tests trees of drafts: use drafts=AutoDrafts(), for example.")
        return jacobi(
            model, condition, generators=generators, sampling=sampling, guidance_scale=guidance_scale,
            cfg_interval=cfg_interval, settings=settings.guesses, num_tokens=num_tokens,
            relaxation=relaxation, on_step=on_step, editable=editable,
            known=known,
        )  # fmt: skip
    sampling = sampling or Sampling(order=settings.filter_order)
    began = time.perf_counter()
    guidance = Guidance.of(guidance_scale, cfg_interval, settings.guidance_schedule, model)
    total = num_tokens or model.num_tokens
    network = backends.select(model, settings.weights)
    run = SpeculativeRun(
        model, network, network.new_tree_cache, condition, generators=generators, sampling=sampling, guidance=guidance,
        settings=settings, rule=rule, drafter=drafter, total=total, known=known,
    )  # fmt: skip
    rounds = SpeculativeRounds(network, run.cache)
    rounds.runs.append(run)
    run.sampled.seconds["prefill"] = time.perf_counter() - began
    reporter = Reporter(run, on_step, editable)
    while not reporter.stopped() and not run.is_whole:
        if not reporter.editable:
            rounds.retire(run)
        rounds.round()
    run.sampled.tokens = run.tokens[:, : reporter.reported] if on_step is not None else run.tokens
    run.sampled.seconds["decode"] = time.perf_counter() - began - run.sampled.seconds["prefill"]
    return run.sampled


class SpeculativeRun:
    """The images of one call, with their own drafts, rule of acceptance, sampling and guidance.

    A call of a pipeline is a run that is alone in its `SpeculativeRounds`; a running batch has several. What a run does
    depends on its own tokens, states and random numbers only.

    Args:
        model, condition, generators, sampling, settings, drafter, known: as of `speculative`.
        network: the target, or a backend of it.
        new_cache: called as (rows, nodes of a tree at most), makes the cache that the prefixes are stored in.
        guidance: of this run alone; its number of streams drops when the unconditional rows leave.
        rule: of the settings.
        total: tokens of an image.

    Attributes:
        images: numbers of those in the batch.
        rows: their sequences in the target's cache, the conditional ones first.
        tokens: (B, N), of which the first `lengths` (B) are sampled.
        calls: of the target for each image (B) while it was not complete, the first included.
        cache: the target's.
        sampled: what the run has cost.
    """

    def __init__(
        self,
        model: LlamaGen,
        network: Any,
        new_cache: Callable[[int, int], TreeCache],
        condition: dict,
        *,
        generators: list[torch.Generator],
        sampling: Sampling,
        guidance: Guidance,
        settings: Speculative,
        rule: AcceptanceRule,
        drafter: torch.nn.Module | None,
        total: int,
        known: KnownTokens | None = None,
    ) -> None:
        self.model, self.sampling, self.generators = network, sampling, generators
        self.guidance, self.rule, self.total, self.known = guidance, rule, total, known
        prefix, valid = condition_rows(model, condition, guided=guidance.streams == 2)
        batch, self.before = len(generators), prefix.shape[1]
        self.images, self.lengths, self.rows = list(range(batch)), [1] * batch, list(range(len(prefix)))
        self.calls, self.settings = [1] * batch, settings
        self.tokens = torch.zeros(batch, self.total, dtype=torch.long, device=prefix.device)
        context = DraftContext(
            self.model, valid, batch, sampling, guidance, drafter, settings.weights, model.region_conditioning(prefix)
        )  # fmt: skip
        assert not isinstance(settings.drafts, Jacobi)
        self.candidates = settings.drafts.candidate_generator(context)
        self.cache = new_cache(len(prefix), self.candidates.nodes)
        states = self.model.prefill_states(prefix, valid, self.cache)
        self.cache.keep_all()
        self.states: torch.Tensor | None = None
        if self.candidates.uses_states:
            self.states = states.new_zeros(len(prefix), self.before + self.total, states.shape[2])
            self.states[:, : self.before] = states
        logits = self._predicted(self.model.logits(states[:, -1:]), self.tokens[:, :1])
        self.tokens[:, 0] = sampling.sample(logits[:, 0], generators)
        self.sampled = SpeculativeOutput(self.tokens, 1, len(prefix), image_calls=batch, image_tokens=batch)

    @property
    def is_whole(self) -> bool:
        """Whether all images are complete."""
        return min(self.lengths) >= self.total

    def draft(self) -> Tree:
        """A tree for each image in the batch."""
        self._progress = self._new_progress()
        return self.candidates.get_candidates(self._progress)

    def fed(self, tree: Tree, nodes: int) -> tuple[torch.Tensor, ...]:
        """What the target reads of trees, filled up to so many nodes: tokens, positions and ancestors of all rows."""
        more, rows = nodes - tree.tokens.shape[1], self.guidance.rows
        positions = self.before - 1 + self._behind(tree)
        ancestors = F.pad(tree.ancestors, (0, more, 0, more))
        return rows(F.pad(tree.tokens, (0, more))), rows(F.pad(positions, (0, more))), rows(ancestors)

    def accept(self, tree: Tree, states: torch.Tensor, logits: torch.Tensor) -> list[list[int]]:
        """Goes on behind what is accepted of trees, by the target's states (rows, n, dim) and logits (rows, n, V).

        Returns:
            The nodes that each row's cache is to keep.
        """
        logits = self._predicted(logits, self._behind(tree))
        result, following = self._verify(tree, logits, self._progress.generators)
        lengths = [self.lengths[image] for image in self.images]
        kept = [path if length < self.total else [] for path, length in zip(result.paths, lengths)]
        self._write(tree, kept, following.tolist())
        for image, path in zip(self.images, kept):
            self.calls[image] += bool(path)
        if self.states is not None:
            self._keep_states(states, kept, lengths)
        self.candidates.update_candidate_strategy(tree, logits)
        self.sampled.target_calls += 1
        self.sampled.row_calls += len(states)
        self.sampled.image_calls += sum(map(bool, kept))
        self.sampled.image_tokens += sum(map(len, kept))
        return kept * self.guidance.streams

    def _behind(self, tree: Tree) -> torch.Tensor:
        """Numbers (b, n) of the tokens behind the nodes."""
        return self._progress.lengths[:, None] + tree.depths

    def _predicted(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Logits (b, n, V) of the tokens `index` (b, n), guided; known tokens are certain."""
        logits = self.guidance.combine(logits, index)
        return logits if self.known is None else self.known.pin(logits, index, self._tensor(self.images))

    def _new_progress(self) -> Progress:
        lengths = [self.lengths[image] for image in self.images]
        max_depth = [max(0, self.total - length - 1) for length in lengths]
        tokens = self.tokens if len(self.images) == len(self.tokens) else self.tokens[self.images]
        generators = [self.generators[image] for image in self.images]
        return Progress(tokens, self._tensor(lengths), self._tensor(max_depth), generators, self.states)

    def _tensor(self, numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, device=self.tokens.device)

    def _verify(self, tree: Tree, logits: torch.Tensor, generators) -> tuple[VerifyResult, torch.Tensor]:
        """What is accepted, and the token (B,) behind it. An image's random numbers do not depend on the others."""
        if self.sampling.greedy:
            result = verify_greedy(tree, logits, self.rule)
            return result, logits[list(range(len(logits))), result.last].argmax(dim=-1)
        uniforms = [torch.rand(self.candidates.nodes, generator=g, device=g.device) for g in generators]
        result = verify(tree, logits, torch.stack(uniforms), self.sampling, self.rule)
        assert result.distribution is not None
        return result, sample_rows(result.distribution, generators)

    def _write(self, tree: Tree, kept: list[list[int]], following: list[int]) -> None:
        """Puts the accepted drafts and the tokens behind them in their places."""
        images: list[int] = []
        places: list[int] = []
        tokens: list[int] = []
        for image, path, drafted, last in zip(self.images, kept, tree.token_lists, following):
            if path:
                start, self.lengths[image] = self.lengths[image], self.lengths[image] + len(path)
                images += [image] * len(path)
                places += range(start, start + len(path))
                tokens += [*(drafted[node] for node in path[1:]), last]
        image_index, place, token = self._tensor([images, places, tokens])
        self.tokens[image_index, place] = token

    def _keep_states(self, states: torch.Tensor, kept: list[list[int]], lengths: list[int]) -> None:
        """Stores the target's states at the roots and the accepted drafts."""
        rows: list[int] = []
        nodes: list[int] = []
        places: list[int] = []
        for row, (path, length) in enumerate(zip(kept * self.guidance.streams, lengths * self.guidance.streams)):
            start = self.before + length - 1
            rows += [row] * len(path)
            nodes += path
            places += range(start, start + len(path))
        row_index, node, place = self._tensor([rows, nodes, places])
        assert self.states is not None
        self.states[row_index, place] = states[row_index, node]

    def is_like(self, other: "SpeculativeRun") -> bool:
        """Whether images of the other run may go on in this one: whether only conditions and seeds differ."""
        ours, theirs = ((run.settings, run.sampling, run.guidance.scale) for run in (self, other))
        return ours == theirs

    def settle(self) -> None:
        """Does what new images need before another run absorbs this one."""
        self.candidates.settle(self._new_progress())

    def absorb(self, other: "SpeculativeRun") -> None:
        """Images of another run, which is like this one and settled, go on in this one, behind its own."""
        counts, streams = (len(self.images), len(other.images)), range(self.guidance.streams)
        start = counts[0] * len(streams)
        order = [
            first + stream * count + image
            for stream in streams
            for first, count in ((0, counts[0]), (start, counts[1]))
            for image in range(count)
        ]
        self.candidates.absorb(other.candidates, counts[0], order)
        rows = self.rows + other.rows
        self.rows = [rows[place] for place in order]
        if self.states is not None and other.states is not None:
            self.states = torch.cat((self.states, other.states))[order]
        self.images += [len(self.lengths) + image for image in other.images]
        self.tokens = torch.cat((self.tokens, other.tokens))
        self.lengths, self.calls = self.lengths + other.lengths, self.calls + other.calls
        self.generators = self.generators + other.generators

    def forget(self, images: list[int]) -> dict[int, int]:
        """Forgets images that are not in the batch any more; the new number of each other image."""
        stay = [image for image in range(len(self.lengths)) if image not in images]
        now = {before: image for image, before in enumerate(stay)}
        self.tokens, self.images = self.tokens[stay], [now[image] for image in self.images]
        self.lengths = [self.lengths[image] for image in stay]
        self.calls = [self.calls[image] for image in stay]
        self.generators = [self.generators[image] for image in stay]
        return now

    def places(self, images: list[int]) -> list[int]:
        """Places among `rows` of all sequences of some images, by their places among `images`."""
        return [stream * len(self.images) + place for stream in range(self.guidance.streams) for place in images]

    def select(self, images: list[int], places: list[int]) -> None:
        """Goes on with some images and rows, by their places among those in the batch."""
        self.images = [self.images[place] for place in images]
        self.rows = [self.rows[place] for place in places]
        self.states = None if self.states is None else self.states[places]
        self.candidates.select(images, places)

    def rewind(self, lengths: list[int]) -> None:
        """Goes back to the first `lengths` tokens of each image; all are still in the batch."""
        self.lengths, stored = lengths, list(self.cache.lengths)
        for row, length in zip(self.rows, lengths * self.guidance.streams):
            stored[row] = self.before + length - 1
        self.cache.crop_rows(stored)
        self.candidates.rewind(lengths)


class SpeculativeRounds:
    """Rounds of runs that share the calls of the target, whatever their settings and however far each image is.

    Args:
        network: the target, or a backend of it.
        cache: its cache, with the rows of all runs and no others.
    """

    def __init__(self, network: Any, cache: TreeCache) -> None:
        self.network, self.cache = network, cache
        self.runs: list[SpeculativeRun] = []

    def round(self) -> None:
        """One tree of drafts and one call of the target for each image in the batch."""
        for run in self.runs:
            if run.guidance.is_over(min(run.lengths)):
                run.guidance.streams = 1
                self._select(run, list(range(len(run.images))), list(range(len(run.images))))
        trees = [run.draft() for run in self.runs]
        nodes = max(tree.tokens.shape[1] for tree in trees)
        fed = [torch.cat(part) for part in zip(*(run.fed(tree, nodes) for run, tree in zip(self.runs, trees)))]
        rows = [row for run in self.runs for row in run.rows]
        tokens, positions, ancestors = (_in_order(part, sorted(range(len(rows)), key=rows.__getitem__)) for part in fed)
        states = self.network.extend_tree(tokens, self.cache, positions, ancestors)
        logits = self.network.logits(states)
        kept: list[list[int]] = [[] for _ in rows]
        for run, tree in zip(self.runs, trees):
            own, count = (_in_order(part, run.rows) for part in (states, logits)), tree.tokens.shape[1]
            for row, path in zip(run.rows, run.accept(tree, *(part[:, :count] for part in own))):
                kept[row] = path
        self.cache.keep(kept)

    def retire(self, run: SpeculativeRun) -> None:
        """Goes on without the images of a run that are complete."""
        stay = [place for place, image in enumerate(run.images) if run.lengths[image] < run.total]
        if len(stay) < len(run.images):
            self._select(run, stay, run.places(stay))

    def _select(self, run: SpeculativeRun, images: list[int], places: list[int]) -> None:
        stay = set(places)
        gone = [row for place, row in enumerate(run.rows) if place not in stay]
        run.select(images, places)
        self._release(gone)

    def _release(self, gone: list[int]) -> None:
        """Rows that belong to no run any more leave the cache."""
        now = {before: row for row, before in enumerate(self.cache.drop_rows(gone))}
        for run in self.runs:
            run.rows = [now[row] for row in run.rows]


def _in_order(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Rows of a tensor; the tensor itself where those are all, in their order."""
    if rows == list(range(len(values))):
        return values
    return values[torch.tensor(rows, device=values.device)]
