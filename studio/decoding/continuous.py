"""Continuous batching: images join a running batch between two calls of the model, and leave it when they are whole.

Scheduling by iteration as in Orca (Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative
Models", OSDI 2022), for images: prompts, guidance, temperatures and filters may differ from row to row, and rows stand
at different positions.

A call reads the last token of each image and, where that is faster, guesses behind it: Jacobi decoding with the
coupling "seed" (`studio.decoding.jacobi`), whose tokens do not depend on the guesses. So the tokens of an image are
those of `autoregressive` for the same generator, whatever else is in the batch and whenever it joined: with the
compiled step bit by bit, elsewhere in float32 up to rounding of the logits. Other dtypes round differently in every
batch; there, guesses are made only where all images allow them.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from studio import backends
from studio.checks import check_integer, check_room
from studio.decoding.autoregressive import Guidance, check_schedule, condition_rows, guided_logits
from studio.decoding.couplings import PositionRaces, leading
from studio.decoding.sampling import Sampling
from studio.decoding.windows import CPU_ROWS, TOKENS_A_CALL
from studio.models.llamagen import LlamaGen

_LONGEST_WINDOW = 16
_OTHER_ROWS = 256  # positions of a call, elsewhere than on a CPU, that take about as long as one
_RUNS = 3  # times that a window is timed


@dataclass(eq=False)
class BatchImage:
    """An image in a batch.

    Attributes:
        place: its row in the batch's tensors.
        rows: its sequences in the cache, the conditional one first.
        length: tokens that are final.
        calls: of the model since it joined, the first included.
        guessed: whether a call has read guesses behind its last token.
    """

    place: int
    rows: list[int]
    sampling: Sampling
    guesses: bool
    length: int = 1
    calls: int = 1
    guessed: bool = False


class ContinuousBatch:
    """A running batch.

    Args:
        model: a `LlamaGen` in evaluation mode.
        max_images: images at a time, at most.
        weights: as of `Autoregressive`.
        window: tokens that a call reads of each image, at most 16; None: what is fastest by measurement.

    Raises:
        StudioError: a number outside its range.
    """

    def __init__(self, model: LlamaGen, *, max_images: int, weights: str = "auto", window: int | None = None) -> None:
        self.max_images = check_integer("max_images", max_images, 1)
        self._window = None if window is None else check_integer("window", window, 1, _LONGEST_WINDOW)
        self._model, self._network = model, backends.select(model, weights)
        self._total, self._before = model.num_tokens, model.prefix_length
        slots = min(self._window or _LONGEST_WINDOW, self._total)
        self._cache = model.new_batch_cache(2 * max_images, slots)
        device, vocab = model.device, model.config.vocab_size
        self._exact = model.dtype == torch.float32 and weights not in ("float16", "int8")
        self._tokens = torch.zeros(max_images, self._total + slots, dtype=torch.long, device=device)
        self._reached = torch.ones(max_images, dtype=torch.long, device=device)
        self._guessed = torch.ones_like(self._reached)
        self._scales = torch.ones(max_images, self._total, device=device)
        self._races = PositionRaces([torch.Generator()] * max_images, vocab, slots, self._total, device)
        self._steps = torch.arange(slots, device=device)
        self._path = torch.ones(1, slots, slots, dtype=torch.bool, device=device).tril()
        self._free = list(range(max_images))[::-1]
        first = CPU_ROWS if device.type == "cpu" else _OTHER_ROWS
        self._widths = Widths([width for width in TOKENS_A_CALL if width <= slots], first)
        self._plan: _Plan | None = None
        self.images: list[BatchImage] = []

    @property
    def room(self) -> int:
        """Images that may join."""
        return len(self._free)

    @torch.no_grad()
    def join(
        self,
        condition: dict,
        *,
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        guidance_scale: float = 1.0,
        guidance_schedule: str | None = None,
        guesses: bool = True,
    ) -> list[BatchImage]:
        """Images join, with their first token.

        Args:
            condition, generators, sampling, guidance_scale: as of `autoregressive`, for these images alone.
            guidance_schedule: as of `Autoregressive`.
            guesses: whether guesses may be made in a dtype that rounds.

        Raises:
            StudioError: there is no room.
        """
        count = len(generators)
        check_room(self.room, count)
        check_schedule(guidance_schedule)
        guidance = Guidance.of(guidance_scale, -1, guidance_schedule, self._model)
        prefix, valid = condition_rows(self._model, condition, guided=guidance.streams == 2)
        cache = self._model.new_prefix_cache(len(prefix))
        logits = self._network.logits(self._network.prefill_states(prefix, valid, cache)[:, -1:])
        cache.keep_all()
        start = self._cache.rows
        self._cache.join(cache)
        joined = [
            BatchImage(self._free.pop(), list(range(start + number, start + len(prefix), count)), sampling, guesses)
            for number in range(count)
        ]
        self.images += joined
        self._plan = None
        places = torch.tensor([image.place for image in joined], device=self._tokens.device)
        self._tokens[places] = 0
        first = guidance.combine(logits, torch.zeros_like(places)[:, None])[:, 0]
        self._tokens[places, 0] = sampling.sample(first, list(generators))
        whole = guidance.scale if guidance.by_token is None else guidance.by_token
        self._scales[places] = whole if guidance.streams == 2 else 1.0
        self._reached[places] = self._guessed[places] = 1
        for image, generator in zip(joined, generators):
            self._races.generators[image.place], self._races.taken[image.place] = generator, 1
        return joined

    def leave(self, image: BatchImage) -> None:
        """An image leaves, whole or not; its tokens are kept until another takes its place."""
        for row in sorted(image.rows, reverse=True):
            last = self._cache.rows - 1
            self._cache.leave(row)
            for other in self.images:
                other.rows = [row if each == last else each for each in other.rows]
        self.images.remove(image)
        self._free.append(image.place)
        self._plan = None

    def tokens(self, image: BatchImage, count: int | None = None) -> torch.Tensor:
        """The first tokens (n,) of an image, all final ones by default."""
        return self._tokens[image.place, : image.length if count is None else count].clone()

    @torch.no_grad()
    def step(self) -> list[BatchImage]:
        """One call of the model for all images; those that are whole now leave, and are returned."""
        finished = [image for image in self.images if image.length >= self._total]
        for image in finished:
            self.leave(image)
        if not self.images:
            return finished
        began, rows = time.perf_counter(), self._cache.rows
        plan = self._plan = self._plan or _Plan.of(self.images, self._tokens.device)
        chosen = self._width()
        width = min(chosen, self._total - min(image.length for image in self.images))
        reached, flat = self._reached[plan.places], self._tokens.view(-1)
        index = reached[:, None] + self._steps[:width]  # of the tokens to predict
        starts = plan.places[:, None] * self._tokens.shape[1]
        fed = flat.take(starts - 1 + torch.minimum(index, self._guessed[plan.places][:, None]))
        positions = (self._before - 1 + index).clamp(max=self._before + self._total - 1)
        visible = self._path[:, :width, :width].expand(len(plan.image_of), -1, -1)
        states = self._network.extend_tree(fed[plan.image_of], self._cache, positions[plan.image_of], visible)
        scales = self._scales[plan.places].gather(1, index.clamp(max=self._total - 1))
        logits = plan.guided(self._network.logits(states), scales[:, :, None])

        ends = [image.length + width for image in self.images]
        self._races.reach([image.place for image in self.images], ends)
        outcomes = plan.winners(logits, self._races, index)
        right = leading(fed[:, 1:] == outcomes[:, :-1])
        new = torch.minimum(right + 1, self._total - reached)
        flat.scatter_(0, (starts + index).view(-1), outcomes.view(-1))
        self._reached[plan.places], self._guessed[plan.places] = reached + new, reached + width
        counts = new.tolist()  # the only wait for the device
        kept: list[range] = [range(0)] * self._cache.rows
        for image, count in zip(self.images, counts):
            image.length, image.calls, image.guessed = image.length + count, image.calls + 1, image.guessed or width > 1
            for row in image.rows:
                kept[row] = range(count)
        self._cache.keep(kept)
        if width == chosen:
            self._widths.add(rows, width, time.perf_counter() - began)
        whole = [image for image in self.images if image.length >= self._total]
        for image in whole:
            self.leave(image)
        return [*finished, *whole]

    def _width(self) -> int:
        """Tokens that a call reads of each image."""
        if not self._exact and not all(image.guesses for image in self.images):
            return 1
        if self._window is not None:
            return self._window
        return self._widths.choose(self._cache.rows)


class Widths:
    """How many tokens of each image to read in a call, by the time that real calls have taken.

    The first calls of so many rows try the expected width and its neighbours; then the one is taken that should give
    most tokens a second.

    Args:
        widths: those that may be taken, in increasing order.
        positions: of a call, over all rows, that is expected to be fastest.
    """

    def __init__(self, widths: Sequence[int], positions: int) -> None:
        self._choices, self._positions = list(widths), positions
        self._seconds: defaultdict[int, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))

    def choose(self, rows: int) -> int:
        """The width of the next call of so many rows."""
        seconds = self._seconds[_rounded(rows)]
        timed = [width for width in self._choices if len(seconds[width]) >= _RUNS]
        if not timed:
            fitting = [width for width in self._choices if width * rows <= self._positions]
            return fitting[-1] if fitting else 1
        best = max(timed, key=lambda width: TOKENS_A_CALL[width] / min(seconds[width]))
        place = self._choices.index(best)
        neighbours = self._choices[max(place - 1, 0) : place + 2]
        return next((width for width in neighbours if len(seconds[width]) < _RUNS), best)

    def add(self, rows: int, width: int, seconds: float) -> None:
        """Note the seconds of a call."""
        known = self._seconds[_rounded(rows)][width]
        if len(known) < _RUNS:
            known.append(seconds)


def _rounded(rows: int) -> int:
    """Numbers of rows that take about as long are one."""
    return rows if rows <= 2 else 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


@dataclass(frozen=True)
class _Plan:
    """What does not change until an image joins or leaves: n images with R sequences.

    Args:
        places: (n,) rows of the batch's tensors.
        image_of: (R,) the image of each sequence in the cache.
        conditional, unconditional: (n,) the sequences of each image; without guidance the same one twice.
        temperatures: (n, 1, 1).
        filters: images by the filters that they share.
        greedy: (n, 1), which images take the likeliest token; None where none does.
    """

    places: torch.Tensor
    image_of: torch.Tensor
    conditional: torch.Tensor
    unconditional: torch.Tensor
    temperatures: torch.Tensor
    filters: list[tuple[Sampling, torch.Tensor]] = field(default_factory=list)
    greedy: torch.Tensor | None = None

    @classmethod
    def of(cls, images: Sequence[BatchImage], device: torch.device) -> "_Plan":
        """The plan of these images."""

        def numbers(values: list, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        image_of = [0] * sum(len(image.rows) for image in images)
        groups: dict[Sampling, list[int]] = {}
        for number, image in enumerate(images):
            for row in image.rows:
                image_of[row] = number
            groups.setdefault(replace(image.sampling, temperature=1.0), []).append(number)
        greedy = [image.sampling.greedy for image in images]
        return cls(
            numbers([image.place for image in images]),
            numbers(image_of),
            numbers([image.rows[0] for image in images]),
            numbers([image.rows[-1] for image in images]),
            numbers([image.sampling.divisor for image in images], torch.float32)[:, None, None],
            [(shared, numbers(group)) for shared, group in groups.items()],
            numbers(greedy, torch.bool)[:, None] if any(greedy) else None,
        )

    def guided(self, logits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Logits (n, w, V) out of those of all sequences (R, w, V), with scales (n, w, 1), 1 without guidance."""
        if len(self.image_of) == len(self.places):
            return logits[self.conditional]
        return guided_logits(logits[torch.cat((self.conditional, self.unconditional))], scales)

    def winners(self, logits: torch.Tensor, races: PositionRaces, index: torch.Tensor) -> torch.Tensor:
        """Samples for logits (n, w, V) of the tokens `index` (n, w)."""
        scaled = logits / self.temperatures
        if len(self.filters) == 1:
            outcomes = races.winners(self.filters[0][0], scaled, self.places, index)
        else:
            outcomes = torch.empty_like(index)
            for shared, group in self.filters:
                outcomes[group] = races.winners(shared, scaled[group], self.places[group], index[group])
        return outcomes if self.greedy is None else torch.where(self.greedy, logits.argmax(dim=-1), outcomes)
