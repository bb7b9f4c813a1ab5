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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from studio import backends
from studio.checks import check_integer, set_fields, shown
from studio.decoding.autoregressive import Autoregressive, Guidance, autoregressive, condition_rows
from studio.decoding.couplings import COUPLINGS, Chance, PositionRaces, decide, leading, next_proposals, one_hot
from studio.decoding.sampling import KnownTokens, OnStep, Reporter, Sampling, SpeculativeOutput
from studio.decoding.windows import choose_window
from studio.errors import StudioError
from studio.models.llamagen import LlamaGen

if TYPE_CHECKING:
    from studio.decoding.lantern import Relaxation


@dataclass(frozen=True)
class Jacobi:
    """Settings of Jacobi decoding.

    Args:
        window: tokens that a call of the model reads for each image, the last token and guesses behind it, at least 1.
            "auto": with the coupling "seed", what should be fastest by the measured cost of a call: 1, which is no
            guesses, where they should gain less than a tenth. With others, whose samples depend on the window, 6
            tokens over the conditional and unconditional sequences of an image on a CPU, and 16 elsewhere.
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

    `sequences` holds the tokens of each image: the first `lengths`, which are final, and the guesses behind them;
    `tokens` (B, N + window) has the final ones on the device. `proposals` (b, window - 1, V) are the distributions q
    that the guesses of the window were sampled from, where the coupling tests them.
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
        self.sequences: list[list[int]] = self.tokens[:, :1].tolist()
        self.path = torch.empty(0, 0, 0, dtype=torch.bool, device=device)
        self.generators, self.races, self.proposals = generators, None, None
        if not sampling.greedy and self.coupling in ("seed", "gumbel"):
            slots = total if editable and batch > 1 else window  # an image alone goes back to its last window at most
            self.races = PositionRaces(generators, logits.shape[-1], slots, total, device)
        if not sampling.greedy and self.coupling != "seed":
            self.proposals = logits.new_empty(batch, window - 1, logits.shape[-1])
            self.proposals[:] = one_hot(self.tokens[:, :1], self.proposals)
        self._compiled = None
        if self.proposals is not None and self.coupling != "gumbel" and sampling.top_p == 1:
            self._compiled = backends.select_guess_outcomes(logits)
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
        lengths = [self.lengths[number] for number in self.numbers]
        windows = [token for number in self.numbers for token in self._window(number, width)]
        following = [length + place for length in lengths for place in range(width)]  # the tokens to predict
        numbers = torch.tensor(windows + following, device=self.tokens.device)
        fed, index = numbers.view(2, len(lengths), width).unbind()
        if self.known is not None:
            fed = self.known.fill(fed, index - 1, self.images)
        if self.on_round is not None:
            self.on_round(index[:, 0], fed)
        positions = index + (self.before - 1)
        if max(lengths) + width > self.total:
            positions = positions.clamp(max=self.before + self.total - 1)
        rows = self.guidance.rows
        states = self.model.extend_tree(rows(fed), self.cache, rows(positions), self._visible(width))
        found = self._decide(self.model.logits(states), fed[:, 1:], index)

        self._write(index, found[:, :-1])
        counts = []
        for number, length, (*outcomes, right) in zip(self.numbers, lengths, found.tolist()):  # waits for the device
            self.sequences[number][length:] = outcomes
            self.lengths[number] = min(length + right + 1, self.total)
            counts.append(self.lengths[number] - length)
        self.cache.keep([range(count) for count in counts] * self.guidance.streams)
        self.sampled.target_calls += 1
        self.sampled.row_calls += len(states)
        self.sampled.image_calls += sum(map(bool, counts))
        self.sampled.image_tokens += sum(counts)

    def _window(self, number: int, width: int) -> list[int]:
        """The last final token of an image and guesses behind it; the last guess is repeated."""
        last = self.lengths[number] - 1
        window = self.sequences[number][last : last + width]
        return window + window[-1:] * (width - len(window))

    def _visible(self, width: int) -> torch.Tensor:
        """Which tokens of windows of this width each of them sees, for all rows."""
        rows = len(self.numbers) * self.guidance.streams
        if self.path.shape[:2] != (rows, width):
            path = torch.ones(width, width, dtype=torch.bool, device=self.tokens.device).tril()
            self.path = path.expand(rows, -1, -1).contiguous()
        return self.path

    def _write(self, index: torch.Tensor, outcomes: torch.Tensor) -> None:
        """Puts outcomes (b, n) into their places (b, n) of `tokens`."""
        if len(self.images) == len(self.tokens):
            self.tokens.scatter_(1, index, outcomes)
        else:
            self.tokens[self.images[:, None], index] = outcomes

    def _predicted(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Logits (b, n, V) of the tokens `index` (b, n), guided; known tokens are certain."""
        logits = self.guidance.combine(logits, index)
        return logits if self.known is None else self.known.pin(logits, index, self.images)

    def _decide(self, logits: torch.Tensor, guesses: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What comes out at each of n places and, behind that, how many guesses of an image are right: (b, n + 1).

        Args:
            logits: of all rows (b or 2b, n, V), as the model gives them.
            guesses: (b, n - 1).
            index: (b, n), of the tokens that they predict.
        """
        if self._compiled is not None:
            scales = self.guidance.scales(index) if self.known is None else None
            return self._compiled(
                self._predicted(logits, index) if scales is None else logits, scales, guesses, self.proposals,
                self._chance(index).numbers, self.sampling.divisor, self.sampling.top_k, self.coupling == "maximal",
                self.relaxation,
            )  # fmt: skip
        logits = self._predicted(logits, index)
        outcomes, right = (
            self._likeliest(logits, guesses) if self.sampling.greedy else self._sampled(logits, guesses, index)
        )
        return torch.cat((outcomes, right[:, None]), dim=1)

    def _likeliest(self, logits: torch.Tensor, guesses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outcomes = logits.argmax(dim=-1)
        if self.relaxation is None:
            return outcomes, leading(guesses == outcomes[:, :-1])
        passed = self.relaxation.is_likeliest(logits[:, :-1].flatten(0, 1), guesses.reshape(-1, 1))
        right = leading(passed.view_as(guesses))
        kept = torch.arange(guesses.shape[1], device=guesses.device) < right[:, None]
        outcomes[:, :-1] = torch.where(kept, guesses, outcomes[:, :-1])
        return outcomes, right

    def _sampled(
        self, logits: torch.Tensor, guesses: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        won = None
        if self.races is not None:
            self.races.reach(self.numbers, [self.lengths[number] + index.shape[1] for number in self.numbers])
            won = self.races.winners(self.sampling, logits, self.images, index)
            if self.coupling == "seed":
                return won, leading(guesses == won[:, :-1])
        assert self.proposals is not None
        distributions = self.sampling.probabilities(logits.flatten(0, 1)).view_as(logits)
        outcomes, right = decide(
            distributions, guesses, self.proposals, self._chance(index), self.coupling, self.relaxation
        )
        if won is not None:
            behind = torch.arange(index.shape[1], device=index.device) > right[:, None]
            outcomes = torch.where(behind, won, outcomes)
        self.proposals = next_proposals(distributions, outcomes, right)
        return outcomes, right

    def _chance(self, index: torch.Tensor) -> Chance:
        return Chance.of([self.generators[number] for number in self.numbers], index.shape[1], index.device)

    def retire(self) -> None:
        """Goes on without the images that are complete."""
        stay = [place for place, number in enumerate(self.numbers) if self.lengths[number] < self.total]
        count = len(self.numbers)
        if len(stay) == count:
            return
        self.numbers = [self.numbers[place] for place in stay]
        self.cache.select_rows([stream * count + place for stream in range(self.guidance.streams) for place in stay])
        self.images = self.images[stay]
        self.proposals = None if self.proposals is None else self.proposals[stay]

    def rewind(self, lengths: list[int]) -> None:
        """Goes back to the first `lengths` tokens of each image; all are still in the batch.

        The tokens behind stay as guesses where any guess will do. Else they would need the distribution that they were
        sampled from, which their tests have changed.
        """
        for number, length in enumerate(lengths):
            row, last = self.sequences[number], self.tokens[number, length - 1]
            row[length - 1] = int(last)
            if length < self.lengths[number] and self.proposals is not None:
                del row[length:]
                self.proposals[number] = one_hot(last.view(1, 1), self.proposals)
        self.lengths = lengths
        self.cache.crop_rows([self.before + length - 1 for length in lengths] * self.guidance.streams)
