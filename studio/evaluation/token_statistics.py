"""Statistics of visual tokens as of a language ("Analyzing The Language of Visual Tokens", arXiv:2411.05001).

How many bits a token carries, how frequencies fall (Zipf), how the vocabulary grows (Heaps), how well tokens compress,
and what neighbours tell of each other. Every number depends on how many tokens there are, and some say little by
themselves, so all stand beside three controls: the same tokens shuffled inside each image, shuffled over all images,
and uniform ones.

Definitions are ours where the abstract leaves them open: rows in raster order; least squares on logarithms; mutual
information as the plug-in estimate minus that of shuffled pairs; half of the images held out for the models' bits.
"""

import lzma
from dataclasses import dataclass

import numpy as np

from studio.checks import shown
from studio.errors import StudioError

CONTROLS = ("shuffled-inside", "shuffled-all", "uniform")
HELD_OUT = 0.5
FEWEST = 10
_FIRST_TYPES = 100
_WEIGHTS = [4.0**power for power in range(5)]


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of images.

    Attributes:
        name: what they are of.
        tokens: (n, h, w) code numbers in raster order; a row of tokens has h = 1.
        vocabulary: how many codes there are.
    """

    name: str
    tokens: np.ndarray
    vocabulary: int

    def control(self, kind: str, rng: np.random.Generator) -> "TokenGrid":
        """The tokens of a control, one of `CONTROLS`."""
        if kind == "shuffled-inside":
            changed = rng.permuted(self.tokens.reshape(len(self.tokens), -1), axis=1)
        elif kind == "shuffled-all":
            changed = rng.permutation(self.tokens.reshape(-1))
        elif kind == "uniform":
            changed = rng.integers(self.vocabulary, size=self.tokens.size)
        else:
            raise StudioError(f"A control is one of {', '.join(CONTROLS)}, not {shown(kind)}.")
        return TokenGrid(self.name, changed.reshape(self.tokens.shape), self.vocabulary)


def analyze_tokens(grid: TokenGrid, *, seed: int = 0, grammar: bool = False) -> list[dict]:
    """One row of statistics for the tokens and one for every control.

    Args:
        grid: of ten images at least.
        seed: of the controls and of shuffled pairs.
        grammar: whether to build the re-pair grammar, which takes seconds.

    Returns:
        Rows with "name", "control" (None for the tokens themselves), "n" (tokens), and the `statistics`.

    Raises:
        StudioError: too few images.
    """
    if len(grid.tokens) < FEWEST:
        raise StudioError(f"Statistics of tokens need {FEWEST} images at least, not {len(grid.tokens)}.")
    rng, rows = np.random.default_rng(seed), []
    for control in (None, *CONTROLS):
        tokens = grid if control is None else grid.control(control, rng)
        found = statistics(tokens, rng)
        if grammar:
            found["grammar"] = grammar_size(tokens.tokens.reshape(len(tokens.tokens), -1), grid.vocabulary)
        rows.append({"name": grid.name, "control": control, "n": tokens.tokens.size, **found})
    return rows


def statistics(grid: TokenGrid, rng: np.random.Generator) -> dict[str, float | None]:
    """The statistics of tokens.

    Returns:
        "codes_used" (share of the codebook), "entropy" (bits a token), "zipf" and "zipf_r2" (exponent and fit of
        frequency over rank), "heaps" (exponent of types over tokens), "distinct2" (different pairs of neighbours),
        "lzma" (compressed size over that of a fixed code), "unigram_bits" and "bigram_bits" (held-out bits a token),
        "mi_right", "mi_down" and "mi_far" (bits that a token tells of its neighbour, of the one below, and four on;
        None where there is none).
    """
    tokens, size = grid.tokens, grid.vocabulary
    counts = np.bincount(tokens.reshape(-1), minlength=size)
    slope, fit = _line(np.log(np.arange(1, (counts > 0).sum() + 1)), np.log(np.sort(counts[counts > 0])[::-1]))
    pairs = _codes(tokens[:, :, :-1], tokens[:, :, 1:], size)
    unigram, bigram = held_out_bits(tokens, size)
    return {
        "codes_used": float((counts > 0).mean()),
        "entropy": _entropy(counts),
        "zipf": -slope,
        "zipf_r2": fit,
        "heaps": heaps_exponent(tokens.reshape(-1)),
        "distinct2": len(np.unique(pairs)) / pairs.size if pairs.size else None,
        "lzma": float(len(lzma.compress(tokens.astype("<u2").tobytes(), preset=9)) / (tokens.size * np.log2(size) / 8)),
        "unigram_bits": unigram,
        "bigram_bits": bigram,
        "mi_right": mutual_information(tokens[:, :, :-1], tokens[:, :, 1:], size, rng),
        "mi_down": mutual_information(tokens[:, :-1], tokens[:, 1:], size, rng),
        "mi_far": mutual_information(tokens[:, :, :-4], tokens[:, :, 4:], size, rng),
    }


def heaps_exponent(tokens: np.ndarray) -> float:
    """The slope of log types over log tokens, from the hundredth token on (all where there are fewer)."""
    _, first = np.unique(tokens, return_index=True)
    types = np.cumsum(np.isin(np.arange(len(tokens)), first))
    begin = _FIRST_TYPES - 1 if len(tokens) > 2 * _FIRST_TYPES else 0
    read = np.arange(begin + 1, len(tokens) + 1)
    return _line(np.log(read), np.log(types[read - 1]))[0]


def mutual_information(left: np.ndarray, right: np.ndarray, size: int, rng: np.random.Generator) -> float | None:
    """Bits that tokens tell of their partners: the plug-in estimate minus that of shuffled pairs, which a sample of any
    finite size has too.
    """
    if not left.size:
        return None
    left, right = left.reshape(-1), right.reshape(-1)

    def plug_in(partners):
        joint = np.unique(_codes(left, partners, size), return_counts=True)[1]
        return _entropy(np.bincount(left)) + _entropy(np.bincount(partners)) - _entropy(joint)

    return plug_in(right) - plug_in(rng.permutation(right))


def held_out_bits(tokens: np.ndarray, size: int) -> tuple[float, float]:
    """Bits a token of the last half of the images, under the frequencies of the first: of single tokens (with half a
    count for each code), and of tokens after their neighbour, mixed with those by the best of a few weights.
    """
    cut = max(1, round(len(tokens) * (1 - HELD_OUT)))
    seen, unseen = tokens[:cut], tokens[cut:]
    unigram = (np.bincount(seen.reshape(-1), minlength=size) + 0.5) / (seen.size + 0.5 * size)
    of_all = float(-np.log2(unigram[unseen]).mean())
    if unseen.shape[2] < 2:
        return of_all, of_all
    codes, counts = np.unique(_codes(seen[:, :, :-1], seen[:, :, 1:], size), return_counts=True)
    before = np.bincount(seen[:, :, :-1].reshape(-1), minlength=size)
    wanted = _codes(unseen[:, :, :-1], unseen[:, :, 1:], size).reshape(-1)
    place = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
    found = np.where(codes[place] == wanted, counts[place], 0)
    left, right = wanted // size, wanted % size
    first = -np.log2(unigram[unseen[:, :, 0]]).sum()  # a row's first token has no neighbour
    best = min(
        -np.log2((found + weight * unigram[right]) / (before[left] + weight)).sum() for weight in _WEIGHTS
    )  # fmt: skip
    return of_all, float((first + best) / unseen.size)


def grammar_size(rows: np.ndarray, size: int) -> float:
    """Rules and what is left over tokens, of a re-pair grammar (Larsson and Moffat, 1999): the commonest pair of
    neighbours becomes a symbol, again and again, while a pair occurs twice.
    """
    text = np.concatenate([np.append(row, -1) for row in rows]).astype(np.int64)  # -1 ends an image
    total, rules, width = rows.size, 0, size + rows.size
    while True:
        inside = (text[:-1] >= 0) & (text[1:] >= 0)
        codes = text[:-1] * width + text[1:]
        values, counts = np.unique(codes[inside], return_counts=True)
        if not len(counts) or counts.max() < 2:
            break
        pair = values[counts.argmax()]
        at = np.flatnonzero(inside & (codes == pair))
        if pair // width == pair % width:  # of a run of one symbol every other pair counts
            start = np.concatenate(([True], np.diff(at) > 1))
            at = at[(np.arange(len(at)) - np.maximum.accumulate(np.where(start, np.arange(len(at)), 0))) % 2 == 0]
            if len(at) < 2:
                break
        text[at] = size + rules
        text = np.delete(text, at + 1)
        rules += 1
    return (rules + int((text >= 0).sum())) / total


def _codes(left, right, size):
    """Numbers of pairs."""
    return left.astype(np.int64) * size + right


def _entropy(counts):
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _line(x, y):
    """Slope and r squared of the least squares line."""
    if len(x) < 2 or np.ptp(y) == 0:
        return 0.0, 1.0
    slope, offset = np.polyfit(x, y, 1)
    rest = y - slope * x - offset
    return float(slope), float(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum())
