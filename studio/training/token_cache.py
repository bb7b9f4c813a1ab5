"""Tokens of every training picture, computed once per image tokenizer and kept on disk."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from studio.checkpoints.bundled import sha256
from studio.data.archive import ARCHIVE, load_pictures
from studio.data.backgrounds import render
from studio.data.splits import combinations
from studio.files import cache_folder


def training_tokens(tokenizer, weights=None, batch_size=256):
    """Tokens of the generators' training combinations.

    Args:
        tokenizer: the image tokenizer.
        weights: its weights file, whose checksum names the cache together with the data's; when `None`, that of the
            folder that it was loaded from.
        batch_size: pictures at a time.

    Returns:
        `(drawn, tokens)`: (concept, style, background) rows (n, 3) and tokens (n, N) of each, int64 tensors.
    """
    weights = weights or Path(tokenizer.config["_name_or_path"], "diffusion_pytorch_model.safetensors")
    drawn = np.array(combinations(held_out=False))
    key = hashlib.sha256((sha256(weights) + sha256(ARCHIVE)).encode()).hexdigest()[:16]
    file = cache_folder() / f"tokens-{key}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.part")
        with open(partial, "wb") as stream:
            np.save(stream, tokens_of(tokenizer, drawn, batch_size).astype(np.uint16))
        partial.replace(file)
    return torch.from_numpy(drawn), torch.from_numpy(np.load(file).astype(np.int64))


@torch.inference_mode()
def tokens_of(tokenizer, drawn, batch_size=256):
    """Tokens (n, N) of combinations (n, 3), a NumPy array as those."""
    pictures = load_pictures(tokenizer.config.sample_size)
    parts = []
    for start in tqdm(range(0, len(drawn), batch_size), desc="tokens", unit="batch"):
        images = render(pictures, drawn[start : start + batch_size]) * 2 - 1
        parts.append(tokenizer.encode(images.to(tokenizer.device)).flatten(1).cpu().numpy())
    return np.concatenate(parts)
