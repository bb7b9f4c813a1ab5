"""What Jacobi decoding gains with each window, and could gain at most with windows chosen anew in every call.

The last row belongs to nobody who decodes: its windows are chosen by a search that knows which guesses will turn out
right, and what each window makes of the next guesses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from studio import backends
from studio.bench.models import check_counts, load_generator
from studio.checks import check_integer
from studio.decoding.autoregressive import Guidance, autoregressive, condition_rows
from studio.decoding.couplings import PositionRaces
from studio.decoding.jacobi import Jacobi, jacobi
from studio.decoding.sampling import Sampling, fill_exponential
from studio.models.llamagen import LlamaGen
from studio.pipelines.llamagen import LlamaGenPipeline

PROMPTS = (
    "a red apple, 3d style, on a white background",
    "clown face, flat style, on a red background",
    "a bagel, 3d style, on a gray background",
)
WINDOWS = (2, 3, 4, 6, 8, 12)
_BEAM = 6


def bench_windows(
    model: str = "emoji-ar",
    *,
    prompts: Sequence[str] = PROMPTS,
    windows: Sequence[int] = WINDOWS,
    repeats: int = 3,
    device: str | None = None,
) -> dict:
    """Samples images with plain decoding and with each window, in turns, one image at a time; seed 0.

    Args:
        model: a bundled name or folder of a text-conditional pipeline with a `LlamaGen`.
        windows: numbers of tokens that a call reads.
        repeats: runs of each image; the fastest counts.

    Returns:
        `{"model", "tokens", "threads", "rows"}`. A row has "window" (1 is plain decoding), and for an image on average
        "calls", "tokens_a_call", "seconds" (decoding alone) and "speedup". The row "best" is an estimate: the fewest
        seconds that a beam search finds over all choices of windows, with the seconds a call that the other rows had.

    Raises:
        StudioError: another kind of model, or a number out of range.
    """
    check_counts(repeats=repeats)
    pipe = load_generator(model, device, LlamaGenPipeline)
    most = pipe.transformer.num_tokens
    windows = sorted({check_integer("Each of windows", window, 2, most) for window in windows})
    scale, sampling, _ = pipe.check_call(list(prompts))
    images = [_Image(pipe.transformer, pipe.condition([prompt], None), scale, sampling) for prompt in prompts]
    seconds, calls = dict.fromkeys((1, *windows), 0.0), dict.fromkeys((1, *windows), 0)
    for image in images:
        runs = [{window: image.decode(window) for window in seconds} for _ in range(repeats + 1)][1:]
        for window in seconds:
            seconds[window] += min(run[window][0] for run in runs)
            calls[window] += runs[0][window][1]
    costs = {window: seconds[window] / calls[window] for window in seconds}
    found = [fewest_seconds(image.outcomes, image.tokens, costs) for image in images]
    measured = [(window, seconds[window], calls[window]) for window in seconds]
    best = ("best", sum(spent for spent, _ in found), sum(count for _, count in found))
    count = len(images)
    rows = [
        {
            "window": window,
            "calls": number / count,
            "tokens_a_call": (most - 1) * count / number,
            "seconds": spent / count,
            "speedup": seconds[1] / spent,
        }
        for window, spent, number in [*measured, best]
    ]
    return {"model": str(model), "tokens": most, "threads": torch.get_num_threads(), "rows": rows}


def fewest_seconds(
    outcomes: Callable[[int, Sequence[int]], list[int]],
    tokens: Sequence[int],
    seconds: dict[int, float],
    beam: int = _BEAM,
) -> tuple[float, int]:
    """The fewest seconds for all tokens behind the first one, and the calls that take them.

    Args:
        outcomes: what a call gives for the positions from n on, by n and the guesses for them; asked with n increasing.
        tokens: (N,) of the image.
        seconds: of a call by window.
        beam: how many sets of guesses are pursued at each position.
    """
    total, widest = len(tokens), max(seconds)
    reached: list[dict[tuple, tuple[float, int]]] = [{} for _ in range(total + 1)]
    reached[1][()] = (0.0, 0)

    def promise(item: tuple[tuple, tuple[float, int]], n: int) -> float:
        right = [guess == token for guess, token in zip(item[0], tokens[n:])]
        return item[1][0] - seconds[1] * (0.4 * _leading(right) + 0.3 * sum(right[:8]))

    for n in range(1, total):
        for guesses, (spent, calls) in sorted(reached[n].items(), key=lambda item: promise(item, n))[:beam]:
            last = guesses[-1] if guesses else tokens[n - 1]
            fed = (*guesses, *[last] * widest)[: min(widest, total - n) - 1]
            found = outcomes(n, fed)
            right = _leading([guess == token for guess, token in zip(fed, tokens[n:])])
            for window, cost in seconds.items():
                width = min(window, len(found))
                count = min(right, width - 1) + 1
                behind = (*found[count:width], *guesses[max(count, width) :])
                now = (spent + cost, calls + 1)
                reached[n + count][behind] = min(now, reached[n + count].get(behind, now))
    return min(reached[total].values())


def _leading(right: list[bool]) -> int:
    return next((place for place, each in enumerate(right) if not each), len(right))


@dataclass
class _Image:
    """One image of a prompt, seed 0."""

    model: LlamaGen
    condition: dict
    scale: float
    sampling: Sampling

    @torch.no_grad()
    def __post_init__(self) -> None:
        model, self.network = self.model, backends.select(self.model)
        self.guidance = Guidance.of(self.scale, -1, None, model)
        self.tokens = autoregressive(model, self.condition, **self._call()).tokens[0].tolist()
        generator, vocab = torch.Generator().manual_seed(0), model.config.vocab_size
        fill_exponential(torch.empty(vocab), generator)
        self.races = PositionRaces([generator], vocab, len(self.tokens), len(self.tokens), model.device)
        self.races.reach([0], [len(self.tokens)])
        prefix, valid = condition_rows(model, self.condition, guided=self.guidance.streams == 2)
        self.before, self.reached = prefix.shape[1], 1
        self.cache = self.network.new_tree_cache(len(prefix), len(self.tokens))
        self.network.prefill_states(prefix, valid, self.cache)
        self.cache.keep_all()

    def _call(self) -> dict:
        generators = [torch.Generator().manual_seed(0)]
        return {"generators": generators, "sampling": self.sampling, "guidance_scale": self.scale}

    def decode(self, window: int) -> tuple[float, int]:
        """Seconds of decoding and calls behind the first token; a window of 1 is plain."""
        if window == 1:
            run = autoregressive(self.model, self.condition, **self._call())
        else:
            run = jacobi(self.model, self.condition, settings=Jacobi(window, "seed"), **self._call())
        return run.seconds["decode"], run.target_calls - 1

    @torch.no_grad()
    def outcomes(self, n: int, guesses: Sequence[int]) -> list[int]:
        """As `fewest_seconds` asks for them."""
        for position in range(self.reached, n):
            self._read(position, [])
            self.cache.keep([range(1)] * self.cache.rows)
        self.reached = n
        logits, index = self._read(n, guesses)
        self.cache.forget()
        image = torch.zeros(1, dtype=torch.long, device=index.device)
        return self.races.winners(self.sampling, logits, image, index)[0].tolist()

    def _read(self, n: int, guesses: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        fed = torch.tensor([[self.tokens[n - 1], *guesses]], device=self.model.device)
        index, rows = n + torch.arange(fed.shape[1], device=fed.device)[None], self.guidance.rows
        visible = torch.ones(1, fed.shape[1], fed.shape[1], dtype=torch.bool, device=fed.device).tril()
        states = self.network.extend_tree(rows(fed), self.cache, rows(self.before - 1 + index), rows(visible))
        return self.guidance.combine(self.network.logits(states), index), index
