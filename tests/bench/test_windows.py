"""With a wide beam the best windows are those of a full search, and the rows are those of real decoding."""

import pytest
import torch

from studio import StudioError
from studio.bench.windows import bench_windows, fewest_seconds

SECONDS = {1: 1.0, 2: 1.3, 4: 2.0}


def game(total=9):
    """An image of tokens 0 to 2 where a right context gives the right token, and another one mostly a wrong one."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, (total,), generator=generator).tolist()

    def outcomes(n, guesses):
        found = []
        for place in range(len(guesses) + 1):
            wrong = sum(guess != token for guess, token in zip(guesses[:place], tokens[n:]))
            found.append((tokens[n + place] + (wrong + n) * (wrong > 0)) % 3)
        return found

    return tokens, outcomes


def full_search(tokens, outcomes, n=1, guesses=()):
    """The fewest seconds over all choices, one after the other."""
    if n == len(tokens):
        return 0.0
    fed = [*guesses, *[guesses[-1] if guesses else tokens[n - 1]] * 4][: min(4, len(tokens) - n) - 1]
    found, right = outcomes(n, fed), 0
    while right < len(fed) and fed[right] == tokens[n + right]:
        right += 1
    spent = []
    for window, cost in SECONDS.items():
        width = min(window, len(found))
        kept = [*found[:width], *guesses[width:]]
        count = min(right + 1, width)
        spent.append(cost + full_search(tokens, outcomes, n + count, tuple(kept[count:])))
    return min(spent)


def test_the_best_windows_are_those_of_a_full_search():
    tokens, outcomes = game()
    seconds, calls = fewest_seconds(outcomes, tokens, SECONDS, beam=1000)
    assert seconds == pytest.approx(full_search(tokens, outcomes))
    assert seconds < 8 * SECONDS[1] and calls < 8
    assert fewest_seconds(outcomes, tokens, SECONDS)[0] < 1.1 * seconds
    assert fewest_seconds(outcomes, tokens, {1: 1.0}) == (8.0, 8)


def test_rows_of_every_window_and_the_best(tiny_folder):
    result = bench_windows(str(tiny_folder), prompts=["a red circle"], windows=(2, 5), repeats=1, device="cpu")
    plain, two, five, best = rows = result["rows"]
    assert [row["window"] for row in rows] == [1, 2, 5, "best"]
    assert plain["calls"] == result["tokens"] - 1 and plain["speedup"] == plain["tokens_a_call"] == 1
    assert two["calls"] >= five["calls"] and all(row["calls"] <= plain["calls"] for row in rows)
    assert best["speedup"] == plain["seconds"] / best["seconds"]
    with pytest.raises(StudioError, match="windows"):
        bench_windows(str(tiny_folder), windows=(1,), device="cpu")
