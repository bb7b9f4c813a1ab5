"""Statistics of tokens: known values on tokens made to have them, controls, and the bundled tokenizer's."""

import json
from pathlib import Path

import numpy as np
import pytest

from studio.errors import StudioError
from studio.evaluation.token_grids import rank_frequencies, token_grids
from studio.evaluation.token_statistics import (
    CONTROLS,
    TokenGrid,
    analyze_tokens,
    grammar_size,
    heaps_exponent,
    held_out_bits,
    mutual_information,
    statistics,
)

RNG = np.random.default_rng
TOKENS = Path(__file__).parent / "emoji_vq_64.npy"


def grid(tokens, vocabulary=16):
    return TokenGrid("toy", np.asarray(tokens), vocabulary)


def test_uniform_tokens_have_all_their_bits_and_no_structure():
    """40,000 tokens (seed 0). Bounds are a few standard errors of the estimates; the chain below is the control."""
    found = statistics(grid(RNG(0).integers(16, size=(400, 10, 10))), RNG(1))
    assert found["entropy"] == pytest.approx(4, abs=0.002) and found["codes_used"] == 1
    assert found["unigram_bits"] == pytest.approx(4, abs=0.01) and found["bigram_bits"] == pytest.approx(4, abs=0.03)
    assert abs(found["mi_right"]) < 0.01 and abs(found["mi_down"]) < 0.01 and found["lzma"] > 1


def test_a_chain_tells_of_its_neighbours():
    """Each token is its left neighbour plus one, but for one in four: H(next | last) = .811 + .25 log2 15 bits."""
    rng, tokens = RNG(0), np.zeros((400, 10, 10), dtype=np.int64)
    tokens[:, :, 0] = rng.integers(16, size=(400, 10))
    for column in range(1, 10):
        step = np.where(rng.random((400, 10)) < 0.75, 1, rng.integers(2, 17, size=(400, 10)))
        tokens[:, :, column] = (tokens[:, :, column - 1] + step) % 16
    bits = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) + 0.25 * np.log2(15)
    found = statistics(grid(tokens), RNG(1))
    assert found["mi_right"] == pytest.approx(4 - bits, abs=0.03) and abs(found["mi_down"]) < 0.01
    assert found["bigram_bits"] == pytest.approx(0.1 * 4 + 0.9 * bits, abs=0.05)  # a row's first token has no neighbour
    assert found["distinct2"] < 0.01 and found["lzma"] < 0.9


def test_zipf_and_heaps_of_known_tokens():
    counts = (6000 / np.arange(1, 17)).astype(int)
    tokens = RNG(0).permutation(np.repeat(np.arange(16), counts))[: (counts.sum() // 10) * 10].reshape(-1, 1, 10)
    found = statistics(grid(tokens), RNG(1))
    assert found["zipf"] == pytest.approx(1, abs=0.02) and found["zipf_r2"] > 0.999
    assert heaps_exponent(np.arange(1000)) == pytest.approx(1)
    assert heaps_exponent(np.zeros(1000, dtype=int)) == pytest.approx(0)


def test_a_grammar_replaces_the_commonest_pair():
    """abab abab: X = ab, then XX, XX are one pair: Y = XX. Two rules and two symbols of eight tokens."""
    assert grammar_size(np.array([[0, 1, 0, 1], [0, 1, 0, 1]]), 4) == (2 + 2) / 8
    assert grammar_size(np.array([[0, 1, 2, 3], [3, 2, 1, 0]]), 4) == 1  # no pair twice; none reaches over two images
    assert grammar_size(np.array([[5, 5, 5, 5]]), 6) == (1 + 2) / 4  # of a run every other pair


def test_single_columns_have_no_neighbours():
    found = statistics(grid(RNG(0).integers(16, size=(50, 4, 1))), RNG(1))
    assert found["mi_right"] is None and found["mi_far"] is None and found["distinct2"] is None
    unigram, bigram = held_out_bits(RNG(0).integers(16, size=(50, 4, 1)), 16)
    assert unigram == bigram
    assert mutual_information(np.zeros((0,)), np.zeros((0,)), 4, RNG(0)) is None


def test_controls_keep_what_they_say():
    tokens = grid(RNG(0).integers(4, size=(20, 3, 3)) + np.arange(20)[:, None, None] % 12)
    inside, everywhere, uniform = (tokens.control(kind, RNG(2)).tokens for kind in CONTROLS)
    assert all((np.sort(a.ravel()) == np.sort(b.ravel())).all() for a, b in zip(inside, tokens.tokens))
    assert (np.sort(everywhere.ravel()) == np.sort(tokens.tokens.ravel())).all()
    assert not all((np.sort(a.ravel()) == np.sort(b.ravel())).all() for a, b in zip(everywhere, tokens.tokens))
    assert uniform.max() == 15
    rows = analyze_tokens(tokens, grammar=True)
    assert [row["control"] for row in rows] == [None, *CONTROLS] and all("grammar" in row for row in rows)
    with pytest.raises(StudioError, match="A control is one of"):
        tokens.control("none", RNG(0))
    with pytest.raises(StudioError, match="10 images at least"):
        analyze_tokens(grid(tokens.tokens[:9]))


def test_a_trained_tokenizer_has_the_known_statistics():
    """What an independent computation found for 600 other combinations, of the tokens and the three controls.

    The tokens are those of a VQ tokenizer of 4,096 codes for 600 emoji of 64 px.
    """
    tokens = TokenGrid("emoji-vq", np.load(TOKENS).astype(np.int64), 4096)
    plain, inside, everywhere, uniform = analyze_tokens(tokens)
    known = {"entropy": 11.43, "zipf": 0.76, "heaps": 0.48, "distinct2": 0.74, "lzma": 0.815, "mi_right": 0.76}
    for name, value in {**known, "unigram_bits": 11.82, "bigram_bits": 10.48}.items():
        assert plain[name] == pytest.approx(value, abs=0.08), name
    for name, value in {"distinct2": 0.95, "lzma": 0.96, "bigram_bits": 11.76, "mi_right": 0.09}.items():
        assert inside[name] == pytest.approx(value, abs=0.02), name
    for row, bits in ((everywhere, (11.65, 11.68)), (uniform, (12.15, 12.17))):
        assert (row["unigram_bits"], row["bigram_bits"]) == pytest.approx(bits, abs=0.03)
        assert row["mi_right"] == pytest.approx(0, abs=0.005) and row["lzma"] == pytest.approx(1.06, abs=0.01)
    assert (uniform["entropy"], uniform["zipf"], uniform["heaps"]) == pytest.approx((11.92, 0.29, 0.38), abs=0.015)
    ranks = rank_frequencies(tokens)
    assert ranks[0][0] == 1 and all(a[1] >= b[1] for a, b in zip(ranks, ranks[1:]))


def test_levels_rows_and_pipelines(
    tiny_resgen_folder, tiny_row_folder, tiny_folder, tiny_mar_folder, image_folder_of_captions
):
    data = str(image_folder_of_captions)
    names = [grid.name for grid in token_grids(str(tiny_resgen_folder / "image_tokenizer"), data=data, images=10)]
    assert [name.rsplit(", ")[-1] for name in names] == ["level 1", "level 2", "level 3"]
    (row,) = token_grids(str(tiny_row_folder / "image_tokenizer"), data=data, images=10)
    assert row.tokens.shape[1:] == (1, 6)
    true, sampled = token_grids(str(tiny_folder), data=data, images=10)
    assert "true" in true.name and "sampled" in sampled.name and true.tokens.shape == sampled.tokens.shape
    with pytest.raises(StudioError, match="no discrete tokens"):
        token_grids(str(tiny_mar_folder), data=data, images=10)
    (levels,) = token_grids(str(tiny_mar_folder / "image_tokenizer"), data=data, images=10)
    assert levels.vocabulary == 32 and levels.name.endswith("first dimension") and levels.tokens.max() < 32


@pytest.fixture
def image_folder_of_captions(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    folder, rng = tmp_path / "images", RNG(0)
    for split, count in (("train", 8), ("validation", 12)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
        lines = [json.dumps({"file_name": f"{number}.png", "text": "a red apple"}) for number in range(count)]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder
