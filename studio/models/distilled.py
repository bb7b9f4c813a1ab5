"""The student of Distilled Decoding (arXiv:2412.17153) for LlamaGen: from noise to all tokens in one call.

The teacher's transformer reads a continuous vector at each position: Gaussian noise, or the code vector of a known
token. A two-row embedding marks which (row 0 noise, row 1 data; the condition counts as data), attention is causal as
in the teacher, and two heads predict token i at position i: logits over the codes, and a code vector by regression. The
module tree carries the names of the authors' release, so their state dicts load as they are.

Deviations from the authors' code: a student made from a teacher starts with the least-squares linear map from code
vectors to the teacher's token embeddings, not with random weights, and may keep fewer layers; heads are applied to the
wanted positions only; captions are supported too (the released code is for classes), where the mean of the valid
caption vectors modulates the regression head.

Scope: the network. `studio.decoding.distilled` samples images with it.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from studio.checks import shown
from studio.errors import StudioError
from studio.models.llama_blocks import Block, CaptionEmbedder, ClassEmbedder, RMSNorm, check_layout, default_ffn_dim
from studio.models.llamagen import LlamaGen
from studio.models.region_conditioning import build_region_conditioning


class RegressionHead(nn.Module):
    """Predicts a code vector: LayerNorm, shift and scale by a table plus the condition, linear layer."""

    def __init__(self, dim: int, code_dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, code_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Vectors (B, n, code_dim) from hidden (B, n, dim) and one condition vector (B, dim) per row."""
        shift, scale = (self.scale_shift_table + context[:, None]).chunk(2, dim=1)
        return self.linear(F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class DistilledStudent(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both bases define config_name
    """Predicts code vectors and logits of all positions from noise or code vectors (B, n, C).

    Args:
        vocab_size, code_dim: size V and width C of the codebook.
        dim, num_layers, num_heads, num_kv_heads, ffn_dim, grid_size, num_classes, caption_dim, caption_length,
            norm_eps, rope_base, prefix_rope, plan_size, row_length: as of the teacher, a `LlamaGen`.
        split: tokens sampled from the logits by default; the regression head gives the others (None: logits give all).

    Raises:
        StudioError: sizes that do not fit together, or conditions that do not fit the model.
    """

    config: Any

    horizon = 5 / 8
    """Fraction of the tokens over which several calls are spread: two calls start at 0 and 5/16, as published (80 of
    256)."""

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        code_dim: int = 8,
        dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        grid_size: int | None = 16,
        num_classes: int | None = None,
        caption_dim: int | None = None,
        caption_length: int | None = None,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        prefix_rope: str = "zero",
        split: int | None = None,
        plan_size: int = 0,
        row_length: int | None = None,
    ):
        super().__init__()
        if (num_classes is None) == (caption_dim is None):
            raise StudioError("Give DistilledStudent exactly one of num_classes and caption_dim.")
        check_layout(grid_size, row_length)
        if split is not None and not 0 <= split <= self.num_tokens:
            raise StudioError(f"split must be from 0 to {self.num_tokens} tokens, not {shown(split)}.")
        self.cls_embedding: ClassEmbedder | CaptionEmbedder
        if num_classes is not None:
            self.cls_embedding = ClassEmbedder(num_classes, dim)
        else:
            assert caption_dim is not None and caption_length is not None
            self.cls_embedding = CaptionEmbedder(caption_dim, caption_length, dim)
        hidden = ffn_dim or default_ffn_dim(dim)
        self.tok_embeddings = nn.Linear(code_dim, dim)
        self.n_d_embed = nn.Embedding(2, dim)
        self.layers = nn.ModuleList(
            Block(dim, num_heads, num_kv_heads or num_heads, hidden, norm_eps, 0.0) for _ in range(num_layers)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.final_layer_conti = RegressionHead(dim, code_dim)
        if plan_size:
            self.plan_embeddings = build_region_conditioning(plan_size, grid_size, row_length, dim)
        self._rope: torch.Tensor | None = None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def from_teacher(
        cls, teacher: LlamaGen, codebook: torch.Tensor, *, split: int | None = None, num_layers: int | None = None
    ) -> "DistilledStudent":
        """A student in float32 that starts from the teacher's weights.

        Args:
            teacher: the model that it will be distilled from.
            codebook: code vectors (V, C) of the teacher's tokens, as for the noise map.
            split: see the class.
            num_layers: how many of the teacher's layers to keep, evenly spread from first to last; None: all.

        Condition, blocks, final norm and logits are copied. The input layer is the least-squares linear map from code
        vectors to the teacher's token embeddings; the noise/data embedding and the regression head are random.

        Raises:
            StudioError: a codebook of another size, or a number of layers out of range.
        """
        vocab, code_dim = codebook.shape
        if vocab != teacher.config.vocab_size:
            raise StudioError(
                f"The codebook has {vocab} codes but the teacher samples from {teacher.config.vocab_size}."
            )
        shared = {name: teacher.config[name] for name in inspect.signature(cls).parameters if name in teacher.config}
        layers = teacher.config.num_layers
        if num_layers is not None and not 1 <= num_layers <= layers:
            raise StudioError(
                f"num_layers must be from 1 to {layers}, the layers of the teacher, not {shown(num_layers)}."
            )
        kept = torch.linspace(0, layers - 1, num_layers or layers).round().int().tolist()
        student = cls(**{**shared, "num_layers": len(kept)}, code_dim=code_dim, split=split)
        given = teacher.state_dict()
        codes = torch.cat((codebook, codebook.new_ones(vocab, 1)), dim=1).float().cpu()
        line = torch.linalg.lstsq(codes, given["tok_embeddings.weight"].float().cpu()).solution
        weights = {name: given[name] for name in given if not name.startswith(("tok_embeddings.", "layers."))}
        for new, old in enumerate(kept):
            weights |= {f"layers.{new}.{name}": weight for name, weight in teacher.layers[old].state_dict().items()}
        weights |= {"tok_embeddings.weight": line[:-1].T, "tok_embeddings.bias": line[-1]}
        student.load_state_dict(student.state_dict() | weights)
        return student.to(teacher.device)

    embed_condition = LlamaGen.embed_condition
    region_conditioning = LlamaGen.region_conditioning
    prefix_mask = staticmethod(LlamaGen.prefix_mask)
    prefix_length = LlamaGen.prefix_length
    num_tokens = LlamaGen.num_tokens
    head_dim = LlamaGen.head_dim
    rope = LlamaGen.rope

    @property
    def bounds(self) -> range:
        """Number of known positions after 0, 1, ... steps of the teacher; a step is one token."""
        return range(self.num_tokens + 1)

    def inputs(
        self, vectors: torch.Tensor, known: int | torch.Tensor, **condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Inputs (B, T + n, dim) of the blocks, valid positions (B, T) of the prefix, and condition vectors (B, dim).

        Arguments are those of `hidden_states`.
        """
        prefix, valid = self.embed_condition(**condition)
        length, n = prefix.shape[1], vectors.shape[1]
        if n > self.num_tokens:
            raise StudioError(f"The model samples {self.num_tokens} tokens; {n} vectors were given.")
        if valid is None:
            context = prefix.mean(dim=1)
        else:
            present = valid[:, :, None].to(prefix.dtype)
            context = (prefix * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        known = torch.as_tensor(known, device=prefix.device).reshape(-1, 1)
        is_data = torch.arange(length + n, device=prefix.device) < length + known
        embedded, regions = self.tok_embeddings(vectors.to(prefix.dtype)), self.region_conditioning(prefix)
        if regions is not None:
            embedded = embedded + regions[:, length - 1 : length - 1 + n]
        return torch.cat((prefix, embedded), dim=1) + self.n_d_embed(is_data.long()), valid, context

    def hidden_states(
        self, vectors: torch.Tensor, known: int | torch.Tensor, **condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states (B, n, dim) of the positions, and the condition vector (B, dim).

        Args:
            vectors: (B, n, C), code vectors at the first `known` positions and noise behind; n up to all.
            known: one number, or one per row (B,), from 0 to n.
            condition: `class_labels` (B,), or `captions` (B, T, caption_dim) and `caption_mask` (B, T).
        """
        x, valid, context = self.inputs(vectors, known, **condition)
        rope, mask = self.rope()[: x.shape[1]], self.prefix_mask(valid, x.shape[1])
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, None, index)
        return x[:, -vectors.shape[1] :], context

    def classify(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Logits (B, n, V), float32, of hidden states (B, n, dim); the condition vector is not used."""
        return self.output(self.norm(hidden)).float()

    def regress(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Code vectors (B, n, C), float32, of hidden states (B, n, dim) and the condition vector (B, dim)."""
        return self.final_layer_conti(hidden, context).float()

    def forward(
        self, vectors: torch.Tensor, known: int | torch.Tensor, **condition: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Code vectors (B, n, C) and logits (B, n, V), both float32; arguments as of `hidden_states`."""
        hidden, context = self.hidden_states(vectors, known, **condition)
        return self.regress(hidden, context), self.classify(hidden, context)
