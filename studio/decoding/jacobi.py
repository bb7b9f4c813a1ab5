"""Jacobi decoding: several tokens for a call of the model, without a drafter and without training.

"Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding" (SJD,
arXiv:2410.01699): a window of guesses behind the last token is read in one call, the guesses that are right are kept,
and what the call predicts for the others is guessed next. The `coupling` says what is right, and what is guessed:

- "seed", our default: the noise of a position is the noise that plain decoding would use there. A guess is right when
  it is the token that wins with this noise, so the tokens are those of `autoregressive` for the same generators: with
  the compiled step bit by bit, elsewhere in float32 up to rounding of the logits. At the end the generators are in the
  same state, too.
- "none", the paper's rule: a guess x from a distribution q is accepted with probability p(x) / q(x), else a sample of
  max(p - q, 0) takes its place; guesses behind it are sampled anew from what this call predicts.
- "maximal" ("Speculative Coupled Decoding", arXiv:2510.24211): guesses behind the first rejected one are tested too,
  and stay as guesses where they pass. What comes out of such a test is distributed as p, so q becomes p for all of
  them: with the old q, as in part of the authors' code, tokens follow another distribution.
- "gumbel": guesses win with noise that each position keeps, and are tested as above with fresh random numbers.

All but "seed" sample from the model's distribution, too, but other tokens for a seed. `Lantern(drafts=Jacobi())`
relaxes the tests that commit a token, and only those: a guess x may then also borrow from its nearest codes, at most
delta * q(x), so that each token's distribution moves by at most delta in total variation.

Deviations from the authors' code: images of a batch advance by different lengths, and use their own generators alone;
new places at the end of the window repeat the last guess; filters act once, before the test.
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from studio import backends
from studio.checks import check_integer, set_fields, shown
from studio.decoding.autoregressive import Autoregressive, Guidance, autoregressive, condition_rows
from studio.decoding.sampling import (
    KnownTokens,
    OnStep,
    Reporter,
    Sampling,
    SpeculativeOutput,
    exponential_noise,
    fill_exponential,
)
from studio.decoding.trees import path_call
from studio.errors import StudioError
from studio.models.llamagen import LlamaGen

if TYPE_CHECKING:
    from studio.decoding.lantern import Relaxation

COUPLINGS = ("seed", "none", "maximal", "gumbel")
TOKENS_A_CALL = {1: 1.0, 2: 1.47, 3: 1.87, 4: 2.23, 6: 2.85, 8: 3.36, 12: 4.2, 16: 5.3, 24: 6.6, 32: 7.8}
"""Tokens of an image for a call by window, as measured on a model of 256 tokens an image."""
CPU_ROWS, _OTHER_WINDOW = 8, 16
_windows: "weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, int]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Jacobi:
    """Settings of Jacobi decoding.

    Args:
        window: tokens that a call of the model reads for each image, the last token and guesses behind it, at least 1.
            "auto": with the coupling "seed", what should be fastest by the measured cost of a call: 1, which is no
            guesses, where they do not pay. With others, whose samples depend on the window, 8 tokens over the
            conditional and unconditional sequences of an image on a CPU, and 16 elsewhere.
        coupling: "seed", "none", "maximal" or "gumbel". None: "seed"; as `drafts` of another decoding "maximal".
        filter_order, weights, guidance_schedule: as of `Autoregressive`; as `drafts` of another decoding, those of
            that.
        on_round: called before each call of the model as (lengths (B,), tokens (B, n)): how many tokens of each image
            are final, the last of which is tokens[:, 0], and the guesses behind it.

    Raises:
        StudioError: for a value outside these ranges.
    """

    window: int | str = "auto"
    coupling: str | None = None
    filter_order: str = "llamagen"
    weights: str = "auto"
    guidance_schedule: str | None = None
    on_round: Callable[[torch.Tensor, torch.Tensor], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        Autoregressive(self.filter_order, self.weights, self.guidance_schedule)
        if self.window != "auto":
            set_fields(self, window=check_integer('window, where it is not "auto",', self.window, 1))
        if self.coupling is not None and self.coupling not in COUPLINGS:
            raise StudioError(f"coupling is one of {', '.join(COUPLINGS)}, not {shown(self.coupling)}.")

    @property
    def joins(self) -> bool:
        """Whether requests may join a running batch: whether tokens are those of plain decoding, and weights "auto"."""
        return self.coupling in (None, "seed") and self.weights == "auto"

    @property
    def sampled(self) -> bool:
        """Whether guesses are random and tested as such: what `LanternPlusPlus` asks of its drafts."""
        return self.coupling != "seed"


@dataclass
class JacobiSampled(SpeculativeOutput):
    """As of `SpeculativeOutput`; `window` is the one that was used."""

    window: int = 0


@torch.no_grad()
def jacobi(
    model: LlamaGen,
    condition: dict,
    *,
    generators: list[torch.Generator],
    sampling: Sampling | None = None,
    guidance_scale: float = 1.0,
    cfg_interval: int = -1,
    settings: Jacobi | None = None,
    relaxation: "Relaxation | None" = None,
    num_tokens: int | None = None,
    on_step: OnStep | None = None,
    editable: bool = True,
    known: KnownTokens | None = None,
) -> JacobiSampled:
    """Generates the tokens of B images.

    Args:
        model, condition, generators, sampling, guidance_scale, cfg_interval, num_tokens: as of `autoregressive`.
        relaxation: how the tests that commit a token are relaxed; of `Lantern`, never with the coupling "seed".
        on_step: called as (index, tokens (B, index + 1)) for each token that all images have reached; True stops.
        editable: whether `on_step` may write to the last of those tokens. An image goes back to a token that it
            changes, so images that are complete stay in the batch until the others are.
        known: tokens (B, L) that are fed where they stand; the others are sampled given those before them.
    """
    settings = settings or Jacobi()
    sampling = sampling or Sampling(order=settings.filter_order)
    began = time.perf_counter()
    guidance = Guidance.of(guidance_scale, cfg_interval, settings.guidance_schedule, model)
    window = choose_window(model, settings, len(generators), guidance.streams)
    if window == 1 and settings.coupling in (None, "seed") and settings.on_round is None:
        plain = Autoregressive(settings.filter_order, settings.weights, settings.guidance_schedule)
        sampled = autoregressive(
            model, condition, generators=generators, sampling=sampling, guidance_scale=guidance_scale,
            cfg_interval=cfg_interval, settings=plain, num_tokens=num_tokens, on_step=on_step, known=known,
        )  # fmt: skip
        calls = sampled.target_calls * len(generators)
        return JacobiSampled(**vars(sampled), image_calls=calls, image_tokens=sampled.tokens.numel(), window=1)
    total = num_tokens or model.num_tokens
    run = _Run(
        model, condition, generators, sampling, guidance, settings, relaxation, total, min(window, total),
        editable and on_step is not None, known,
    )  # fmt: skip
    run.sampled.seconds["prefill"] = time.perf_counter() - began
    reporter = Reporter(run, on_step, editable)
    while not reporter.stopped() and min(run.lengths) < total:
        if not reporter.editable:
            run.retire()
        run.round()
    run.sampled.tokens = run.tokens[:, : reporter.reported if on_step is not None else total]
    run.sampled.seconds["decode"] = time.perf_counter() - began - run.sampled.seconds["prefill"]
    return run.sampled


class _Run:
    """The images of one call. `numbers`, and `images` (b,) on the device, are those that are still in the batch.

    `tokens` (B, N + window) holds the first `lengths` tokens of each image, which are final, and guesses behind them,
    up to `guessed` (b,) positions. `proposals` (b, window - 1, V) are the distributions q that the guesses of the
    window were sampled from, where the coupling tests them.
    """

    def __init__(
        self, model, condition, generators, sampling, guidance, settings, relaxation, total, window, editable, known
    ) -> None:  # fmt: skip
        self.model, self.sampling, self.guidance = backends.select(model, settings.weights), sampling, guidance
        self.total, self.window, self.relaxation, self.on_round = total, window, relaxation, settings.on_round
        self.coupling, self.known = settings.coupling or "seed", known
        prefix, valid = condition_rows(model, condition, guided=guidance.streams == 2)
        batch, self.before, device = len(generators), prefix.shape[1], prefix.device
        self.cache = self.model.new_tree_cache(len(prefix), window)
        logits = self.model.logits(self.model.prefill_states(prefix, valid, self.cache)[:, -1:])
        self.cache.keep_all()
        self.tokens = torch.zeros(batch, total + window, dtype=torch.long, device=device)
        self.lengths, self.numbers, self.images = [1] * batch, list(range(batch)), torch.arange(batch, device=device)
        self.tokens[:, 0] = sampling.sample(self._predicted(logits, self.tokens[:, :1])[:, 0], generators)
        self.reached, self.guessed = torch.ones_like(self.images), torch.ones_like(self.images)
        self.steps = torch.arange(window, device=device)
        self.path = torch.ones(1, window, window, dtype=torch.bool, device=device).tril()
        self.generators, self.races, self.proposals = generators, None, None
        if not sampling.greedy and self.coupling in ("seed", "gumbel"):
            slots = total if editable and batch > 1 else window  # an image alone goes back to its last window at most
            self.races = PositionRaces(generators, logits.shape[-1], slots, total, device)
        if not sampling.greedy and self.coupling != "seed":
            self.proposals = logits.new_empty(batch, window - 1, logits.shape[-1])
            self.proposals[:] = _one_hot(self.tokens[:, :1], self.proposals)
        self.sampled = JacobiSampled(
            self.tokens, 1, len(prefix), image_calls=batch, image_tokens=batch, window=window
        )  # fmt: skip

    def round(self) -> None:
        """One call of the model over the window of each image."""
        if self.guidance.is_over(min(self.lengths)):
            self.guidance.streams = 1
            self.cache.select_rows(range(len(self.numbers)))
        keeps_plain_tokens = self.proposals is None and self.relaxation is None
        width = min(self.window, self.total - min(self.lengths)) if keeps_plain_tokens else self.window
        index = self.reached[:, None] + self.steps[:width]  # of the tokens to predict
        flat, starts = self.tokens.view(-1), self.images[:, None] * self.tokens.shape[1]
        fed = flat.take(starts - 1 + torch.minimum(index, self.guessed[:, None]))  # the last guess is repeated
        if self.known is not None:
            fed = self.known.fill(fed, index - 1, self.images)
        if self.on_round is not None:
            self.on_round(self.reached, fed)
        rows = self.guidance.rows
        positions = (self.before - 1 + index).clamp(max=self.before + self.total - 1)
        visible = self.path[:, :width, :width].expand(len(fed) * self.guidance.streams, -1, -1)
        states = self.model.extend_tree(rows(fed), self.cache, rows(positions), visible)
        logits = self._predicted(self.model.logits(states), index)

        outcomes, right = self._decide(logits, fed[:, 1:], index)
        new = torch.minimum(right + 1, self.total - self.reached)
        flat.scatter_(0, (starts + index).view(-1), outcomes.view(-1))
        self.reached, self.guessed = self.reached + new, self.reached + width
        counts = new.tolist()  # the only wait for the device
        for number, count in zip(self.numbers, counts):
            self.lengths[number] += count
        self.cache.keep([range(count) for count in counts] * self.guidance.streams)
        self.sampled.target_calls += 1
        self.sampled.row_calls += len(states)
        self.sampled.image_calls += sum(map(bool, counts))
        self.sampled.image_tokens += sum(counts)

    def _predicted(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Logits (b, n, V) of the tokens `index` (b, n), guided; known tokens are certain."""
        logits = self.guidance.combine(logits, index)
        return logits if self.known is None else self.known.pin(logits, index, self.images)

    def _decide(
        self, logits: torch.Tensor, guesses: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What comes out at each place (b, n), and how many guesses of each image are right."""
        if self.sampling.greedy:
            outcomes = logits.argmax(dim=-1)
            if self.relaxation is None:
                return outcomes, leading(guesses == outcomes[:, :-1])
            passed = self.relaxation.is_likeliest(logits[:, :-1].flatten(0, 1), guesses.reshape(-1, 1))
            right = leading(passed.view_as(guesses))
            outcomes[:, :-1] = torch.where(self.steps[:-1] < right[:, None], guesses, outcomes[:, :-1])
            return outcomes, right
        if self.races is not None:
            self.races.reach(self.numbers, [self.lengths[number] + index.shape[1] for number in self.numbers])
        if self.coupling == "seed":
            assert self.races is not None
            outcomes = self.races.winners(self.sampling, logits, self.images, index)
            return outcomes, leading(guesses == outcomes[:, :-1])
        assert self.proposals is not None
        chance = _Chance.of([self.generators[number] for number in self.numbers], logits.shape[1], logits.device)
        compiled = None if self.sampling.top_p < 1 else backends.select_guess_outcomes(logits)
        if compiled is not None and self.coupling != "gumbel":
            return compiled(
                logits, guesses, self.proposals, chance.tests, chance.samples, self.sampling.divisor,
                self.sampling.top_k, self.coupling == "maximal", self.relaxation,
            )  # fmt: skip
        distributions = self.sampling.probabilities(logits.flatten(0, 1)).view_as(logits)
        outcomes, right = decide(distributions, guesses, self.proposals, chance, self.coupling, self.relaxation)
        if self.coupling == "gumbel":
            assert self.races is not None
            behind = self.steps > right[:, None]
            outcomes = torch.where(behind, self.races.winners(self.sampling, logits, self.images, index), outcomes)
        self.proposals = next_proposals(distributions, outcomes, right)
        return outcomes, right

    def retire(self) -> None:
        """Goes on without the images that are complete."""
        stay = [place for place, number in enumerate(self.numbers) if self.lengths[number] < self.total]
        count = len(self.numbers)
        if len(stay) == count:
            return
        self.numbers = [self.numbers[place] for place in stay]
        self.cache.select_rows([stream * count + place for stream in range(self.guidance.streams) for place in stay])
        self.images, self.reached, self.guessed = self.images[stay], self.reached[stay], self.guessed[stay]
        self.proposals = None if self.proposals is None else self.proposals[stay]

    def rewind(self, lengths: list[int]) -> None:
        """Goes back to the first `lengths` tokens of each image; all are still in the batch.

        The tokens behind stay as guesses where any guess will do. Else they would need the distribution that they were
        sampled from, which their tests have changed.
        """
        changed = self.images.new_tensor([new != old for new, old in zip(lengths, self.lengths)]).bool()
        self.lengths, self.reached = lengths, self.images.new_tensor(lengths)
        self.cache.crop_rows([self.before + length - 1 for length in lengths] * self.guidance.streams)
        if self.proposals is not None:
            self.guessed = torch.where(changed, self.reached, self.guessed)
            last = self.tokens.gather(1, self.reached[:, None] - 1)
            self.proposals = torch.where(changed[:, None, None], _one_hot(last, self.proposals), self.proposals)


def decide(
    distributions: torch.Tensor,
    guesses: torch.Tensor,
    proposals: torch.Tensor,
    chance: "_Chance",
    coupling: str,
    relaxation: "Relaxation | None" = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tests the guesses of B windows of n places, all places at once.

    Args:
        distributions: the model's distributions p (B, n, V) of the token at each place, after filters, given all
            guesses before.
        guesses: (B, n - 1), one for each place but the last.
        proposals: the distributions q (B, n - 1, V) that they were sampled from; one-hot for a guess without any.
        chance: fresh random numbers.
        coupling: "none", "maximal" or "gumbel".
        relaxation: what guesses may borrow in the tests that commit a token.

    Returns:
        Outcomes (B, n) and how many guesses pass before the first that fails, (B,). With r of these, outcomes 0 to r
        are tokens: the guesses that passed and, behind them, a sample of max(p - q, 0), or of p at the last place. The
        outcomes behind are the next guesses; with "gumbel", the caller's noise makes those.
    """
    p, steps = distributions[:, :-1], torch.arange(distributions.shape[1], device=distributions.device)
    own, share = (values.gather(2, guesses[:, :, None])[:, :, 0] for values in (p, proposals))
    held = own
    if relaxation is not None:
        flat = (values.flatten(0, 1) for values in (p, guesses, share))
        held = own + relaxation.borrowed_mass(*flat).view_as(own)
    passed, relaxed = chance.test(share, own, held)
    right = leading(relaxed)
    behind = steps[:-1] > right[:, None]
    kept, replaced = steps[:-1] < right[:, None], steps[:-1] == right[:, None]
    if coupling == "maximal":
        kept, replaced = kept | (behind & passed), replaced | (behind & ~passed)
    rest = (p - proposals).clamp(min=0)
    rest = torch.where(rest.sum(dim=2, keepdim=True) > 0, rest, p)
    weights = torch.cat((torch.where(replaced[:, :, None], rest, p), distributions[:, -1:]), dim=1)
    outcomes = chance.sample(weights)
    outcomes[:, :-1] = torch.where(kept, guesses, outcomes[:, :-1])
    return outcomes, right


def next_proposals(distributions: torch.Tensor, outcomes: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The distributions q (B, n - 1, V) of the guesses behind `right` + 1 new tokens, all of them this call's p.

    That is so for guesses that passed a test and for those that replaced others: as an outcome, both have the
    distribution p. Places beyond this window repeat its last outcome.
    """
    places, images = distributions.shape[1], torch.arange(len(distributions), device=distributions.device)[:, None]
    known = torch.cat((distributions, _one_hot(outcomes[:, -1:], distributions)), dim=1)
    return known[images, (right[:, None] + 1 + torch.arange(places - 1, device=distributions.device)).clamp(max=places)]


class _Chance:
    """Fresh random numbers of one round, in [0, 1): `tests` (B, n - 1) and `samples` (B, n), float64."""

    def __init__(self, tests: torch.Tensor, samples: torch.Tensor) -> None:
        self.tests, self.samples = tests, samples

    @classmethod
    def of(cls, generators: list[torch.Generator], places: int, device: torch.device | str) -> "_Chance":
        """For windows of n places, of each image's generator alone."""
        each = [torch.rand(2 * places, generator=g, device=g.device, dtype=torch.float64) for g in generators]
        numbers = torch.stack(each).to(device)
        return cls(numbers[:, 1:places], numbers[:, places:])

    def test(self, share: torch.Tensor, *masses: torch.Tensor) -> list[torch.Tensor]:
        """Which guesses pass, each with probability mass / share, for each of the masses by the same numbers."""
        return [self.tests * share < mass for mass in masses]

    def sample(self, weights: torch.Tensor) -> torch.Tensor:
        """Samples (B, n) of distributions (B, n, V), up to their sums: the inverse of the distribution function."""
        sums = weights.cumsum(dim=2, dtype=torch.float64)
        return torch.searchsorted(sums, (1 - self.samples[:, :, None]) * sums[:, :, -1:])[:, :, 0]


class PositionRaces:
    """Exp(1) noise (V,) for each position of B images, as plain decoding takes it: in order, a row for a token.

    Args:
        slots: positions whose noise is kept at a time.
        total: positions of an image; the first one has had its noise already.
    """

    def __init__(
        self, generators: list[torch.Generator], vocab: int, slots: int, total: int, device: torch.device | str
    ) -> None:
        self.generators, self.slots, self.total = generators, slots, total
        self.noise, self.taken = torch.ones(len(generators) * slots, vocab, device=device), [1] * len(generators)

    def reach(self, numbers: list[int], ends: list[int]) -> None:
        """Takes the noise of all positions before `ends` of these images."""
        for number, end in zip(numbers, ends):
            for position in range(self.taken[number], min(end, self.total)):
                row = number * self.slots + position % self.slots
                fill_exponential(self.noise[row], self.generators[number])
                self.taken[number] = position + 1

    def winners(
        self, sampling: Sampling, logits: torch.Tensor, images: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """Samples (b, n) for logits (b, n, V) of the tokens `index` (b, n) of these images."""
        rows = images[:, None] * self.slots + index % self.slots
        return sampling.winners(logits.flatten(0, 1), self.noise, rows.flatten()).view(index.shape)


def leading(passed: torch.Tensor) -> torch.Tensor:
    """How many numbers (B,) of each row (B, n) are true before the first that is not."""
    return passed.long().cumprod(dim=1).sum(dim=1)


def _one_hot(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Distributions (B, n, V) of tokens (B, n) that are certain."""
    return like.new_zeros(*tokens.shape, like.shape[2]).scatter_(2, tokens[:, :, None], 1.0)


def choose_window(model: LlamaGen, settings: Jacobi, batch: int, streams: int) -> int:
    """The window of settings, for a batch of images with `streams` sequences each; see `Jacobi`.

    Rounds are timed with the sampling in them, from a window of 8 sequences' tokens on a CPU on to larger and smaller
    ones as long as more tokens a second are to be expected, once for a model, device and batch.
    """
    if not isinstance(settings.window, str):
        return settings.window
    on_cpu = model.device.type == "cpu"
    if settings.coupling not in (None, "seed"):
        return CPU_ROWS // streams if on_cpu else _OTHER_WINDOW
    known = _windows.setdefault(model, {})
    key = (batch, streams, model.device, model.dtype, settings.weights, torch.get_num_threads())
    if key not in known:
        first = CPU_ROWS / (batch * streams) if on_cpu else _OTHER_WINDOW
        known[key] = _fastest_window(model, batch, streams, settings.weights, first)
    return known[key]


def _round_seconds(model: LlamaGen, batch: int, streams: int, window: int, weights: str) -> float:
    """Least seconds of a round, or of a plain step where the window is 1: of a call, and of sampling behind it.

    Of sampling, that is noise for each new token, and a race for each place of the window.
    """
    device, vocab = model.device, model.config.vocab_size
    logits, generator = torch.zeros(batch * window, vocab, device=device), torch.Generator(device)
    noise = exponential_noise(1, vocab, [generator], device).expand(len(logits), -1).contiguous()

    def least(work: Callable[[], Any]) -> float:
        return min([backends.timed(work, device)[0] for _ in range(5)][1:])

    call = least(path_call(model, batch * streams, window, weights))
    race = least(lambda: Sampling().winners(logits, noise))
    return call + race + batch * TOKENS_A_CALL[window] * least(lambda: fill_exponential(noise[0], generator))


def _fastest_window(model: LlamaGen, batch: int, streams: int, weights: str, first: float) -> int:
    windows, speeds = list(TOKENS_A_CALL), {}

    def speed(place: int) -> float:
        if not 0 <= place < len(windows):
            return 0.0
        if place not in speeds:
            seconds = _round_seconds(model, batch, streams, windows[place], weights)
            speeds[place] = TOKENS_A_CALL[windows[place]] / seconds
        return speeds[place]

    best = min(range(len(windows)), key=lambda place: abs(windows[place] - first))
    for step in (1, -1):
        while speed(best + step) > speed(best):
            best += step
    return windows[best]
