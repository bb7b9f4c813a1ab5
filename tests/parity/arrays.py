"""Recordings whose arrays are .npz: authors' weights under their names after a prefix, and everything else."""

import json
from pathlib import Path

import numpy as np
import torch


class Arrays:
    """`info` is the JSON; `arrays[name]` a tensor."""

    def __init__(self, path: Path):
        self.info = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as stored:
            self.arrays = {name: torch.from_numpy(stored[name]) for name in stored}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The arrays whose names start with the prefix, without it."""
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}

    def state(self, prefix: str = "sd.") -> dict[str, torch.Tensor]:
        """Weights, float32."""
        return {name: weight.float() for name, weight in self.under(prefix).items()}


def mar_sizes(config: dict) -> dict:
    """What a state dict does not tell about a `MAR`, from a recording's configuration."""
    return {
        "encoder_heads": config["encoder_num_heads"],
        "decoder_heads": config["decoder_num_heads"],
        "patch_size": config["patch_size"],
    }
