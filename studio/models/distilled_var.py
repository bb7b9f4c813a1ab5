"""The student of Distilled Decoding (arXiv:2412.17153) for VAR: from noise to the tokens of all scales in one call.

The class is a scale of its own, before the others. The input at a position is noise or the code vector of its own
token, not the image so far as for the teacher. A position sees itself and strictly coarser scales. A two-row noise/data
embedding is added to the input and, through one linear layer each, inside every block and before the heads. The module
tree carries the names of the authors' release.

Deviation from the authors' code: a student made from a teacher keeps the class embeddings and gets a random row for the
level of the first scale; theirs reinitialises class 1 by mistake.
"""

import inspect
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.errors import StudioError
from studio.models.distilled import RegressionHead
from studio.models.var import SCALES, VAR, Block, HeadNorm, bounds_of, level_of


class DistilledVAR(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Predicts code vectors and logits of all positions from noise or code vectors (B, n, C).

    Args:
        vocab_size, code_dim, depth, dim, num_heads, num_classes, scales, norm_eps: as of the teacher, a `VAR`.
        split: scales sampled from the logits by default; the regression head gives the others (None: logits give all).

    Raises:
        StudioError: sizes that do not fit together.
    """

    config: Any

    horizon = 1.0
    """Fraction of the scales over which several calls are spread: two calls start at scales 0 and 5 of 10, as
    published (depth 16)."""

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        code_dim: int = 32,
        depth: int = 16,
        dim: int = 1024,
        num_heads: int = 16,
        num_classes: int = 1000,
        scales: tuple[int, ...] = SCALES,
        norm_eps: float = 1e-6,
        split: int | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise StudioError(f"dim {dim} must split into {num_heads} heads.")
        scales, std = tuple(scales), (1 / dim / 3) ** 0.5
        self.word_embed = nn.Linear(code_dim, dim)
        self.class_emb = nn.Embedding(num_classes + 1, dim)
        self.pos_start = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, 1 + bounds_of(scales)[-1], dim))
        self.lvl_embed = nn.Embedding(1 + len(scales), dim)
        self.n_d_embed = nn.Embedding(2, dim)
        self.layerwise_n_d_embed = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth + 1))
        self.blocks = nn.ModuleList(Block(dim, num_heads, norm_eps) for _ in range(depth))
        self.head_nm, self.head = HeadNorm(dim, norm_eps), nn.Linear(dim, vocab_size)
        self.final_layer_conti = RegressionHead(dim, code_dim)
        tables = (self.class_emb.weight, self.pos_start, self.pos_1LC, self.lvl_embed.weight, self.n_d_embed.weight)
        for weight in tables:
            nn.init.trunc_normal_(weight, std=std)

    @classmethod
    def from_teacher(cls, teacher: VAR, split: int | None = None) -> "DistilledVAR":
        """A student in float32 that starts from the teacher's weights.

        Rows of level and position shift by one for the class: row 0 is the teacher's row 0, rows from 2 on are its rows
        from 1 on, row 1 (the first scale) is random, as are the noise/data parts and the regression head.
        """
        shared = {name: teacher.config[name] for name in inspect.signature(cls).parameters if name in teacher.config}
        student = cls(**shared, split=split)
        own = student.state_dict()
        weights = {name: weight.float() for name, weight in teacher.state_dict().items()}
        for name, rows in (("lvl_embed.weight", 0), ("pos_1LC", 1)):
            first, others = weights[name].split((1, weights[name].shape[rows] - 1), dim=rows)
            weights[name] = torch.cat((first, own[name].narrow(rows, 1, 1).to(first.device), others), dim=rows)
        student.load_state_dict(own | weights)
        return student.to(teacher.device)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Number of known positions after 0, 1, ... steps of the teacher; a step is one scale."""
        return bounds_of(tuple(self.config.scales))

    def hidden_states(
        self, vectors: torch.Tensor, known: int | torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states (B, n, dim) of the positions, and the class vector (B, dim).

        Args:
            vectors: (B, n, C), code vectors in the first `known` scales and noise behind; n may end with any scale.
            known: a number of scales, or one per row (B,).
            class_labels: (B,).
        """
        context, length = self.class_emb(class_labels), 1 + vectors.shape[1]
        known = torch.as_tensor(known, device=context.device).long()
        known = torch.tensor(self.bounds, device=context.device)[known].reshape(-1, 1)
        noise_data = self.n_d_embed((torch.arange(length, device=context.device) < 1 + known).long())
        levels = level_of((1, *self.config.scales)).to(context.device)[:length]
        x = torch.cat((context[:, None] + self.pos_start, self.word_embed(vectors.to(context.dtype))), dim=1)
        x = x + self.lvl_embed(levels) + self.pos_1LC[:, :length] + noise_data
        itself = torch.eye(length, dtype=torch.bool, device=context.device)
        mask = (levels[:, None] > levels) | itself
        for block, inside in zip(self.blocks, self.layerwise_n_d_embed):
            x = block(x, context, mask, between=inside(noise_data))
        return (x + self.layerwise_n_d_embed[-1](noise_data))[:, 1:], context

    def classify(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Logits (B, n, V), float32, of hidden states (B, n, dim) and the class vector (B, dim)."""
        return self.head(self.head_nm(hidden, context)).float()

    def regress(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, n, C), float32, of hidden states (B, n, dim) and the class vector (B, dim)."""
        return self.final_layer_conti(hidden, context).float()

    def forward(
        self, vectors: torch.Tensor, known: int | torch.Tensor, class_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Code vectors (B, n, C) and logits (B, n, V), both float32; arguments as of `hidden_states`."""
        hidden, context = self.hidden_states(vectors, known, class_labels)
        return self.regress(hidden, context), self.classify(hidden, context)
