"""What tests of recipes share."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from studio.data import emoji, splits
from studio.training import (
    KINDS,
    diffrate,
    generator,
    kl,
    loop,
    one_d_piece,
    quecc,
    reader,
    reader_network,
    resgen,
    rvq,
    text,
)
from studio.training.options import merge
from studio.training.text_tokenizer import train_text_tokenizer


@cache
def _trained(texts, *lengths):
    return train_text_tokenizer(list(texts), *lengths)


@pytest.fixture
def few_images(monkeypatch, tmp_path):
    """A function: the emoji set has that many combinations on both sides from then on, and caches are empty.

    A text tokenizer is trained once for all tests.
    """

    def only(count):
        few = splits.combinations(held_out=False)[:count]
        monkeypatch.setattr(emoji, "combinations", lambda held_out: few)
        monkeypatch.setattr(emoji, "concepts", lambda held_out: range(4))
        monkeypatch.setattr(text, "train_text_tokenizer", lambda texts, *lengths: _trained(tuple(texts), *lengths))
        monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))

    return only


@pytest.fixture
def recipe():
    """A function: a recipe of a class with options, on the CPU."""

    def made(cls, **options):
        return cls(merge({"kind": cls.kind, **options}), torch.device("cpu"), Path)

    return made


@pytest.fixture
def image_folder(tmp_path):
    """A function that writes random images of several sizes below a folder, in classes or with captions."""

    def write(count=24, *, classes=(), captions=False, name="photos"):
        folder, rng, rows = tmp_path / name, np.random.default_rng(0), []
        for number in range(count):
            below = folder / classes[number % len(classes)] if classes else folder
            below.mkdir(parents=True, exist_ok=True)
            width, height = 20 + number % 7, 18 + number % 5
            pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((width, height)).save(below / f"{number:03}.png")
            rows.append({"file_name": (below / f"{number:03}.png").relative_to(folder).as_posix(),
                         "text": f"a {'red' if number % 2 else 'blue'} pattern {number}"})  # fmt: skip
        if captions:
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


@pytest.fixture
def small(monkeypatch, few_images):
    """Tiny readers, forty images, and no measuring."""
    few_images(40)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(reader_network, "TOWER", {**sizes, "num_hidden_layers": 3})
    monkeypatch.setattr(reader_network, "TEXT", sizes)
    text = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    monkeypatch.setattr("studio.training.text.TEXT", text)
    monkeypatch.setattr(reader, "TILES", ((1, 1),))
    monkeypatch.setattr(reader, "QUESTIONS", 4)
    monkeypatch.setattr(quecc, "QUESTIONS", 4)
    monkeypatch.setattr(diffrate, "QUESTIONS", 4)
    monkeypatch.setattr(loop, "VALIDATION_BATCHES", 1)
    monkeypatch.setattr("studio.training.pair_cache.CHUNK", 4)
    monkeypatch.setattr("studio.training.student.HELD_OUT_PAIRS", 4)
    for module in (kl, rvq, resgen):
        monkeypatch.setattr(module, "MEASURED", 8)
    monkeypatch.setattr(one_d_piece, "FITTED_TO", 16)
    monkeypatch.setattr(generator, "SHOWN", 2)
    for name in KINDS:
        module, recipe = KINDS[name].split(":")
        monkeypatch.setattr(f"{module}.{recipe}.quality", lambda self, folder: {"measured": False})


@pytest.fixture
def saved_often(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1)
    monkeypatch.setattr(loop, "REPORT_EVERY", 1)
