"""What decoding loops share. From logits to tokens: temperature, top-k, top-p, and one random stream per row.

Two filter orders exist in the field. LlamaGen (arXiv:2406.06525, its sampling code): temperature, top-k, top-p, where a
token stays while the probability before it does not exceed p. LANTERN (arXiv:2410.03355, through transformers):
temperature, top-p, top-k, where a token goes when the probability up to it, counted from the least likely, is at most 1
- p.

Further what a loop returns and reports (`Sampled`, `Reporter`), and tokens that are known beforehand (`KnownTokens`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch

from studio import backends
from studio.checks import check_choice, check_integer, check_number, set_fields
from studio.errors import StudioError

OnStep = Callable[..., bool | None]
"""What every loop calls after a step as (step, tokens), or (step, tokens, positions) where tokens have no fixed order.

`step` counts from 0, `tokens` are those of all images so far, which may be written to where a loop says so, and
`positions` (B, k) are those that are new. True stops the loop.
"""
FILTER_ORDERS = ("llamagen", "lantern")
_SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How one token is sampled from logits.

    Args:
        temperature: 0 samples the likeliest token; otherwise logits are divided by it (at least 1e-5).
        top_k: keep the k likeliest tokens (ties with the k-th too); 0 keeps all.
        top_p: keep the likeliest tokens that together hold this probability, in (0, 1]; 1 keeps all.
        order: "llamagen" (top-k first) or "lantern" (top-p first).

    Raises:
        StudioError: for a value outside these ranges or not a number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    order: str = "llamagen"

    def __post_init__(self) -> None:
        set_fields(
            self,
            temperature=check_number("temperature", self.temperature),
            top_k=check_integer("top_k", self.top_k),
            top_p=check_number("top_p", self.top_p, 0, 1, above=True),
        )
        check_choice("The filter order", self.order, FILTER_ORDERS)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def divisor(self) -> float:
        """What logits are divided by."""
        return max(self.temperature, _SMALLEST_TEMPERATURE)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution (rows, V) a token is sampled from, float32."""
        kept = filter_logits(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, order=self.order)
        return kept.softmax(dim=-1)

    def sample(self, logits: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Tokens (rows,) for logits (rows, V); row i uses generators[i] only."""
        if self.greedy:
            return logits.argmax(dim=-1)
        rows, vocab = logits.shape
        return self.winners(logits, exponential_noise(rows, vocab, generators, logits.device))

    def winners(self, logits: torch.Tensor, noise: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (rows,) that win the race of `sample_rows` for logits (rows, V).

        Args:
            noise: Exp(1) noise (n, V).
            places: the row of the noise for each row of logits, (rows,); None: the same one.
        """
        race = None if self.top_p < 1 else backends.select_race(logits, noise)
        if race is not None:
            rows = torch.arange(len(logits)) if places is None else places
            found = race(logits, noise, rows, self.divisor, self.top_k)
            if len(found) == 0 or int(found.min()) >= 0:
                return found
        noise = noise if places is None else noise.index_select(0, places)
        return sample_rows(self.probabilities(logits), noise=noise)


def filter_logits(
    logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, order: str = "llamagen"
) -> torch.Tensor:
    """Logits (rows, V) after temperature and filters; dropped tokens are -inf. The input is left alone."""
    logits = logits.float() / max(temperature, _SMALLEST_TEMPERATURE)
    if order == "llamagen":
        return _top_p_from_likeliest(_top_k(logits, top_k), top_p)
    return _top_k(_top_p_from_least_likely(logits, top_p), top_k)


def _top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    vocab = logits.shape[-1]
    if k <= 0 or k >= vocab:
        return logits
    smallest_kept = logits.kthvalue(vocab - k + 1, dim=-1, keepdim=True).values
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def _top_p_from_likeliest(logits: torch.Tensor, p: float) -> torch.Tensor:
    if p >= 1:
        return logits

    def dropped_in_order(ordered):
        dropped = torch.zeros_like(ordered, dtype=torch.bool)
        dropped[..., 1:] = ordered.softmax(dim=-1).cumsum(dim=-1)[..., :-1] > p
        return dropped

    return _without(logits, dropped_in_order, descending=True)


def _top_p_from_least_likely(logits: torch.Tensor, p: float) -> torch.Tensor:
    if p >= 1:
        return logits

    def dropped_in_order(ordered):
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
        dropped[..., -1] = False
        return dropped

    return _without(logits, dropped_in_order, descending=False)


def _without(
    logits: torch.Tensor, dropped_of: Callable[[torch.Tensor], torch.Tensor], descending: bool
) -> torch.Tensor:
    """Logits (rows, V) with -inf for those that `dropped_of` names among them in order.

    On a CPU the values alone are sorted, which takes a fifth of the time, and the smallest kept one decides; where that
    would keep another number of tokens, because of equal logits, their places are sorted too.
    """
    if logits.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1))
        ordered = ordered.flip(-1) if descending else ordered
        dropped = dropped_of(ordered)
        smallest = ordered.masked_fill(dropped, float("inf")).amin(dim=-1, keepdim=True)
        below = logits < smallest
        if torch.equal(below.sum(dim=-1), dropped.sum(dim=-1)):
            return logits.masked_fill(below, float("-inf"))
    ordered, indices = logits.sort(dim=-1, descending=descending)
    dropped = dropped_of(ordered)
    return logits.masked_fill(dropped.scatter(-1, indices, dropped), float("-inf"))


def exponential_noise(
    rows: int, vocab: int, generators: list[torch.Generator], device: torch.device | str
) -> torch.Tensor:
    """Exp(1) noise (rows, vocab), float32; row i comes from generators[i] alone, in a batch as on its own."""
    if len(generators) != rows:
        raise StudioError(f"{rows} rows need {rows} generators, one each; {len(generators)} were given.")
    noise = torch.empty(rows, vocab, device=device)
    for row, generator in zip(noise, generators, strict=True):
        fill_exponential(row, generator)
    return noise


def fill_exponential(row: torch.Tensor, generator: torch.Generator) -> None:
    """Writes Exp(1) noise into a row (vocab,); a generator of another device makes it there."""
    if generator.device.type == row.device.type:
        row.exponential_(generator=generator)
    else:
        row.copy_(torch.empty(row.shape, device=generator.device).exponential_(generator=generator))


def sample_rows(
    probabilities: torch.Tensor, generators: list[torch.Generator] | None = None, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """One token per row of probabilities (rows, V): the winner of the exponential race argmax(p / noise).

    The race has the distribution of `torch.multinomial`, never waits for the device, and hardly ever turns on a
    rounding error.
    """
    if noise is None:
        rows, vocab = probabilities.shape
        noise = exponential_noise(rows, vocab, generators or [], probabilities.device)
    return (probabilities / noise).argmax(dim=-1)


@dataclass
class Sampled:
    """Tokens (B, n) int64, with n below the number asked for only when the loop was stopped, and what they cost.

    `row_calls` counts sequences over all calls of the model; `seconds` holds "prefill" and "decode"; `decoding` is the
    name of the one that was taken, where the settings left that open.
    """

    tokens: torch.Tensor
    target_calls: int = 0
    row_calls: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    decoding: str | None = None

    @property
    def mean_accepted_length(self) -> float:
        """Tokens of an image per call of the model."""
        return self.tokens.shape[1] / self.target_calls


@dataclass
class SpeculativeOutput(Sampled):
    """As of `Sampled`; `image_calls` counts images over all calls of the model, `image_tokens` the tokens of those."""

    image_calls: int = 0
    image_tokens: int = 0

    @property
    def mean_accepted_length(self) -> float:
        return self.image_tokens / self.image_calls


class Run(Protocol):
    """The images of one call: `tokens` (B, at least N), of which the first `lengths` of each image are final."""

    tokens: torch.Tensor
    lengths: list[int]

    def rewind(self, lengths: list[int]) -> None:
        """Goes back to the first `lengths` tokens of each image, of which the last may have changed."""


class Reporter:
    """Tells `on_step` of tokens that all images have reached, and acts on what it changes.

    Args:
        on_step: called as (index, tokens (B, index + 1)); True stops the loop. None: nothing is reported.
        editable: whether it may write to the last of those tokens.
    """

    def __init__(self, run: Run, on_step: OnStep | None, editable: bool) -> None:
        self.run, self.on_step, self.reported = run, on_step, 0
        self.editable = editable and on_step is not None

    def stopped(self) -> bool:
        """Reports what is new; whether to stop."""
        run = self.run
        while self.on_step is not None and self.reported < min(run.lengths):
            index, self.reported = self.reported, self.reported + 1
            before = run.tokens[:, index].clone() if self.editable else None
            if self.on_step(index, run.tokens[:, : index + 1]):
                return True
            if before is not None:
                changed = run.tokens[:, index].ne(before).tolist()
                if any(changed):
                    run.rewind([index + 1 if is_new else length for is_new, length in zip(changed, run.lengths)])
        return False


@dataclass(frozen=True)
class KnownTokens:
    """Tokens that B images have before sampling begins, as in in- and outpainting.

    A masked model predicts any positions from any others: sampling begins after the known tokens, in an order that has
    them first, which is exact conditioning. A raster-order model conditions on the tokens before a position only: known
    tokens are fed where they stand, and what stands before them does not know of them.

    Args:
        tokens: (B, L), or (B, L, D) of stacks and vectors; at positions that are not known their values do not matter.
        mask: (B, L) bool, true at known positions; as many in each row, and not all.
    """

    tokens: torch.Tensor
    mask: torch.Tensor

    @property
    def unknown(self) -> int:
        """Positions of each image that are to be sampled."""
        return self.mask.shape[1] - int(self.mask[0].sum())

    @property
    def is_prefix(self) -> bool:
        """Whether no known position comes after an unknown one in raster order."""
        return not bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any())

    def known_last(self, order: torch.Tensor) -> torch.Tensor:
        """An order (B, L) whose last entries are sampled first, with the known positions moved to its end."""
        return order.gather(1, self.mask.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))

    def write(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) or (B, L, D) with the known ones in their places."""
        mask = self.mask if tokens.ndim == 2 else self.mask[..., None]
        return torch.where(mask, self.tokens, tokens)

    def fill(self, tokens: torch.Tensor, positions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Tokens (b, n) of positions (b, n) of some images (b,), with the known ones among them."""
        mask, known = self._at(positions, images)
        return torch.where(mask, known, tokens)

    def pin(self, logits: torch.Tensor, positions: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Logits (b, n, V) of the tokens at positions (b, n) of some images (b,); known ones get probability 1."""
        mask, known = self._at(positions, images)
        certain = torch.full_like(logits, float("-inf")).scatter_(2, known[:, :, None], 0.0)
        return torch.where(mask[:, :, None], certain, logits)

    def _at(self, positions, images):
        positions = positions.clamp(0, self.mask.shape[1] - 1)
        return self.mask[images[:, None], positions], self.tokens[images[:, None], positions]


class Fillable:
    """Base of a frozen dataclass some of whose fields may be None."""

    DEFAULTS: ClassVar[dict[str, Any]]
    """What takes the place of None."""

    def filled(self, **defaults: Any) -> Self:
        """These settings with a value for every None: one of `defaults`, such as a pipeline's, else of `DEFAULTS`."""
        missing = [name for name in self.DEFAULTS if getattr(self, name) is None]
        values = {name: defaults.get(name, self.DEFAULTS[name]) for name in missing}
        return replace(self, **values)  # type: ignore[type-var]  # subclasses are dataclasses
