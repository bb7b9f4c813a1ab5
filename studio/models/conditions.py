"""What an image model is conditioned on: a class, or the states of a text encoder, as LlamaGen embeds them."""

import torch
import torch.nn.functional as F
from torch import nn


class ClassEmbedder(nn.Module):
    """A table of classes; its last row is the null class."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: torch.Tensor, drop: torch.Tensor | None) -> torch.Tensor:
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]


class CaptionProjection(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, caption_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projected caption vectors; a dropped row becomes the fixed (never trained) null caption."""

    def __init__(self, caption_dim: int, caption_length: int, dim: int):
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(caption_length, caption_dim) / caption_dim**0.5)

    def forward(self, captions: torch.Tensor, drop: torch.Tensor | None) -> torch.Tensor:
        if drop is not None:
            captions = torch.where(drop[:, None, None], self.uncond_embedding.to(captions.dtype), captions)
        return self.cap_proj(captions)


def left_pad(captions: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the valid vectors of captions (B, T, C) to the end, in order, and zeroes the padding.

    `mask` (B, T) is true at valid vectors, wherever they are; rows that are left-padded already come back unchanged.
    """
    mask = mask.bool()
    order = torch.argsort(mask.int(), dim=1, stable=True)
    mask = mask.gather(1, order)
    captions = captions.gather(1, order[:, :, None].expand_as(captions))
    return captions * mask[:, :, None].to(captions.dtype), mask


def prefix_mask(valid: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Attention mask (B, 1, length, length), true where a query sees a key: causal and not padding, or itself.

    `valid` (B, T) is true at the first T positions that are no padding; without it there is no mask to make.
    """
    if valid is None:
        return None
    mask = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril().repeat(len(valid), 1, 1)
    mask[:, :, : valid.shape[1]] &= valid[:, None, :length]
    mask.diagonal(dim1=1, dim2=2).fill_(True)
    return mask[:, None]
