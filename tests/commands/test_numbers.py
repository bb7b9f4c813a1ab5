"""Numbers that cannot be meant: refused in one sentence before any memory or time is spent on them."""

import numpy as np
import pytest

from studio import StudioError, cli
from studio.bench.cost import bench_cost
from studio.bench.decoding import bench_random_decoding
from studio.bench.mar import bench_mar
from studio.bench.pruning import bench_pruning
from studio.bench.rate_distortion import held_out_images
from studio.bench.reading import bench_reading
from studio.bench.residual import bench_residual
from studio.bench.serve import bench_serve
from studio.bench.tokenizers import bench_tokenizers
from studio.bench.tradeoff import bench_tradeoff
from studio.bench.verify import bench_verify
from studio.data.scenes import draw_scene
from studio.evaluation import evaluate
from studio.evaluation.judge import sample_combinations
from studio.evaluation.scenes import evaluate_inside, evaluate_reader
from studio.evaluation.token_grids import token_grids

TINY = "dim=16,layers=1,heads=1,vocab=16,tokens=4"
COMMANDS = [
    ["bench", "verify", "--vocab"],
    ["bench", "verify", "--nodes"],
    ["bench", "verify", "--k"],
    ["bench", "decoding", "--random", TINY, "--batch"],
    ["bench", "decoding", "--batch"],
    ["bench", "mar", "--batch"],
    ["bench", "serve", "--clients"],
    ["bench", "serve", "--requests"],
    ["bench", "serve", "--max-batch"],
    ["data", "scene", "scene.png", "--questions"],
    ["analyze", "emoji-vq", "--images"],
    *(["train", "vq", f"--{name}"] for name in ("size", "grid", "codes", "dim", "layers", "batch-size", "accumulate")),
    ["train", "one-d-piece", "--tokens"],
    ["train", "vq", "--steps", "1", "--sample-every"],
]
HUGE = [10**11, 10**400]


@pytest.mark.parametrize("value", [*HUGE, -1, "nan"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_refuses_numbers_that_cannot_be_meant(command, value, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command[:-1], f"{command[-1]}={value}"])
    out, err = capfd.readouterr()
    [sentence] = err.strip().splitlines()
    assert stopped.value.code == 2 and not out and len(sentence) < 1000
    assert command[-1].strip("-").replace("-", "_").split("_")[0] in sentence.lower().replace("-", "_"), sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_a_lack_of_memory_is_told(error, capfd, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr("studio.bench.verify.bench_verify", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "verify"])
    assert stopped.value.code == 2 and "not enough memory" in capfd.readouterr().err


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(**_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("studio.bench.verify.bench_verify", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["bench", "verify"])


def scene(**settings):
    return draw_scene(np.random.default_rng(0), **settings)


FUNCTIONS = [
    *((bench_random_decoding, name) for name in ("dim", "layers", "heads", "vocab", "tokens", "batch", "repeats")),
    *((bench_mar, name) for name in ("batch", "repeats")),
    *((bench_verify, name) for name in ("vocab", "nodes", "k", "trees", "repeats")),
    *((bench_pruning, name) for name in ("width", "repeats")),
    *((bench_serve, name) for name in ("clients", "requests", "max_batch")),
    *((bench_tradeoff, name) for name in ("repeats", "images")),
    *((bench_reading, name) for name in ("repeats", "images")),
    *((function, "batch_size") for function in (bench_residual, bench_tokenizers)),
    *((scene, name) for name in ("questions", "emoji", "words")),
    (lambda samples: sample_combinations(samples, np.random.default_rng(0)), "samples"),
    (lambda samples: held_out_images(64, samples, 0), "samples"),
    (lambda number: bench_cost(threads=[number]), "number"),
    (lambda number: bench_cost(positions=[number]), "number"),
    (lambda number: bench_tradeoff(batch_sizes=[number]), "number"),
    (lambda number: bench_pruning(sizes=[(number, 1)]), "number"),
    (lambda number: bench_pruning(sizes=[(576, number)]), "number"),
    (lambda number: scene(tiles=(number, 1)), "number"),
    (lambda images: token_grids("emoji-vq", images=images), "images"),
    (lambda scenes: evaluate_reader(None, None, scenes), "scenes"),
    (lambda scenes: evaluate_inside(None, None, [], scenes), "scenes"),
    (lambda seed: evaluate("emoji-vq", seed=seed), "seed"),
]


@pytest.mark.parametrize(("function", "name"), FUNCTIONS)
def test_a_function_refuses_numbers_that_cannot_be_meant(function, name):
    for value in (*HUGE, -1, True, 1.5, float("nan"), "2", [[2]]):
        if name == "seed" and value == HUGE[0]:
            continue  # a seed may be as large
        with pytest.raises(StudioError, match="must be|cannot be sampled|Give sizes as"):
            function(**{name: value})


def test_numpy_numbers_are_taken():
    assert len(scene(questions=np.int64(3), emoji=np.int8(2), words=np.int16(1)).questions) == 3
    assert bench_verify(vocab=np.int64(64), nodes=np.int64(8), k=np.int64(4), trees=1, repeats=1)["ms"] > 0
