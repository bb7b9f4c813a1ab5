"""Latents of every training picture, computed once per KL tokenizer and kept on disk."""

import hashlib
import os

import numpy as np
import torch
from tqdm.auto import tqdm

from studio.checkpoints.bundled import sha256
from studio.data.archive import ARCHIVE, load_pictures
from studio.data.backgrounds import render
from studio.data.splits import combinations
from studio.files import cache_folder


def training_latents(tokenizer, weights, batch_size=128):
    """Gaussians over latents of the generators' training combinations.

    Args:
        tokenizer: the KL tokenizer.
        weights: its weights file, whose checksum names the cache together with the data's.
        batch_size: pictures at a time.

    Returns:
        `(drawn, laws)`: (concept, style, background) rows (n, 3), int64, and means and standard deviations
        (n, 2, C, h, w), float16 tensors.
    """
    drawn = np.array(combinations(held_out=False))
    key = hashlib.sha256((sha256(weights) + sha256(ARCHIVE)).encode()).hexdigest()[:16]
    file = cache_folder() / f"latents-{key}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.part")
        with open(partial, "wb") as stream:
            np.save(stream, _encode(tokenizer, drawn, batch_size))
        partial.replace(file)
    return torch.from_numpy(drawn), torch.from_numpy(np.load(file))


@torch.inference_mode()
def _encode(tokenizer, drawn, batch_size):
    pictures = load_pictures(tokenizer.config.sample_size)
    parts = []
    for start in tqdm(range(0, len(drawn), batch_size), desc="latents", unit="batch"):
        images = render(pictures, drawn[start : start + batch_size]) * 2 - 1
        law = tokenizer.encode_distribution(images.to(tokenizer.device))
        parts.append(torch.stack((law.mean, law.std), dim=1).to("cpu", torch.float16).numpy())
    return np.concatenate(parts)
