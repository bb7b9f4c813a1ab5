"""Teaches a reader where to look: attention from a question's last word to the patches that show its answer.

Answers alone teach a small language model slowly which of a thousand patches "row 3, column 2" is. Scenes know it, so
some heads of one layer are supervised ("Supervising Neural Attention Models", arXiv:1609.04186; for vision and
language, arXiv:1702.05624). Only training does this; the trained model is a plain one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from studio.data.scenes import CELL, TILE

_LAYER = 2
_SHARE = 0.5
"""Share of the heads that are supervised."""


def cells_of_patches(tiles: tuple[int, int], patch: int) -> torch.Tensor:
    """Number of the scene's cell (T,) in each token that LLaVA-NeXT makes of an image; -1 for thumbnail and newlines.

    Args:
        tiles: rows and columns of tiles of the image.
        patch: pixels of a patch's side.
    """
    rows, columns = (torch.arange(count * TILE // patch) * patch // CELL for count in tiles)
    across = tiles[1] * TILE // CELL
    crops = F.pad(rows[:, None] * across + columns, (0, 1), value=-1)
    return F.pad(crops.flatten(), ((TILE // patch) ** 2, 0), value=-1)


def what_shows(questions: Any, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to look for the answers to the questions about B images, Q about each.

    Args:
        questions: the `Question`s about each image.
        cells: (T,) the cell in each token of the image that is read, -1 for none.

    Returns:
        Which tokens show each answer (B, Q, T), bool, and the share of attention (B, Q) that belongs to the first token
        of the sequence instead: all where none does, as for "no", and one part for as many as there are where those are
        to be counted, so that the number can be told from it.
    """
    shown = torch.stack([
        torch.stack([torch.isin(cells, torch.tensor(question.cells, dtype=cells.dtype)) for question in asked])
        for asked in questions
    ])  # fmt: skip
    counted = torch.tensor([
        [1 / (1 + len(question.cells)) if question.kind == "count" else 0.0 for question in asked]
        for asked in questions
    ])  # fmt: skip
    return shown, torch.where(shown.any(dim=2), counted, 1.0)


class AttentionLoss:
    """Listens to one layer of a language model, whose forward pass is to run inside a `with` block.

    Args:
        language_model: a Llama of transformers.
    """

    def __init__(self, language_model: Any):
        self.attention = language_model.layers[min(_LAYER, len(language_model.layers) - 1)].self_attn

    def __enter__(self):
        self.hook = self.attention.register_forward_pre_hook(self._listen, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def _listen(self, module, args, kwargs):
        self.heard = kwargs["hidden_states"], kwargs["position_embeddings"]

    def __call__(self, asked: torch.Tensor, shown: torch.Tensor, on_first: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the attention on what shows the answers and on the first token, among these and the
        rest of the image.

        Args:
            asked: (B, Q) places in the sequence from which to look.
            shown: (B, Q, T) bool, which of the T places behind the first show each answer.
            on_first: (B, Q) the share that belongs to the first token.
        """
        states, turns = self.heard
        batch, width = len(states), self.attention.head_dim
        split = (
            layer(states).view(batch, states.shape[1], -1, width).transpose(1, 2)
            for layer in (self.attention.q_proj, self.attention.k_proj)
        )
        queries, keys = apply_rotary_pos_emb(*split, *turns)
        told = max(1, int(_SHARE * keys.shape[1]))
        index = asked[:, None, :, None].expand(-1, told, -1, width)
        scores = queries[:, :told].gather(2, index) @ keys[:, :told, : 1 + shown.shape[2]].transpose(2, 3)
        distributions = (scores * self.attention.scaling).log_softmax(dim=-1)
        shown, first = (shown | (on_first == 1)[..., None])[:, None], on_first[:, None]
        elsewhere = distributions[..., 1:].masked_fill(~shown, float("-inf")).logsumexp(dim=-1)
        return -(first * distributions[..., 0] + (1 - first) * elsewhere).mean()
