"""Pairs of noise and tokens for Distilled Decoding (arXiv:2412.17153), drawn from a teacher and kept on disk.

Pair i is decided by its number: a training combination, a caption for it, Gaussian noise, and the tokens to which the
teacher and the noise map lead. Only the tokens are stored, in files of `CHUNK` pairs, so that an interrupted run goes
on where it stopped.
"""

import hashlib
import os

import numpy as np
import torch
from tqdm.auto import tqdm

from studio.data.captions import random_caption
from studio.data.splits import combinations
from studio.decoding.distilled import draw_pairs
from studio.decoding.noise_map import NoiseMap
from studio.decoding.sampling import Sampling
from studio.files import cache_folder

CHUNK = 128
_SEED = 2412


class Pairs:
    """The pairs of one teacher.

    Args:
        pipe: the teacher's pipeline, text-conditional; its own guidance and filters are what a student learns.
    """

    def __init__(self, pipe):
        self.pipe = pipe
        self.codebook = pipe.image_tokenizer.codebook.detach().float()
        self.combinations = np.array(combinations(held_out=False))
        config = pipe.config
        self.guidance_scale = config.default_guidance_scale
        self.sampling = Sampling(
            temperature=config.default_temperature, top_k=config.default_top_k, top_p=config.default_top_p
        )
        self.folder = cache_folder() / f"pairs-{self._key()}"

    def inputs(self, number: int) -> tuple[str, np.ndarray]:
        """Caption and noise (n, C) of a pair."""
        rng = np.random.default_rng((_SEED, number))
        row = self.combinations[rng.integers(len(self.combinations))].tolist()
        shape = (self.pipe.transformer.num_tokens, self.codebook.shape[1])
        return random_caption(*row, rng), rng.standard_normal(shape, dtype=np.float32)

    def condition(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What the teacher and the student are given for captions, in float32."""
        states, mask = self.pipe.encode_prompt(captions)
        return {"captions": states.float(), "caption_mask": mask}

    def tokens(self, count: int) -> torch.Tensor:
        """Tokens (count, n), int64, of the first pairs; those that are not on disk yet are drawn."""
        chunks, noise_map = [], NoiseMap(self.codebook)
        for chunk in tqdm(range(-(-count // CHUNK)), desc="pairs", unit="chunk"):
            file = self.folder / f"{chunk:05}.npy"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f"{file.name}.{os.getpid()}.part")
                with open(partial, "wb") as stream:
                    np.save(stream, self._draw(chunk, noise_map))
                partial.replace(file)
            chunks.append(np.load(file))
        return torch.from_numpy(np.concatenate(chunks)[:count].astype(np.int64))

    def _draw(self, chunk, noise_map):
        captions, noise = zip(*(self.inputs(chunk * CHUNK + index) for index in range(CHUNK)))
        teacher = self.pipe.transformer
        condition = self.condition(list(captions))
        condition["captions"] = condition["captions"].to(teacher.dtype)
        drawn = draw_pairs(
            teacher,
            condition,
            torch.from_numpy(np.stack(noise)).to(teacher.device),
            noise_map,
            sampling=self.sampling,
            guidance_scale=self.guidance_scale,
        )
        return drawn.cpu().numpy().astype(np.uint16)

    def _key(self):
        """Of everything that the tokens follow from: weights, codebook, guidance, filters."""
        found = hashlib.sha256(f"{self.guidance_scale} {self.sampling} {CHUNK}".encode())
        for module in (self.pipe.text_encoder, self.pipe.transformer):
            for name, weight in sorted(module.state_dict().items()):
                found.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
        found.update(self.codebook.cpu().numpy().tobytes())
        return found.hexdigest()[:16]
