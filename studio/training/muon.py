"""Muon: momentum whose update for a matrix is the nearest orthogonal one ("Muon is Scalable for LLM Training",
arXiv:2502.16982, section 2; the iteration is from Keller Jordan's description of Muon, 2024).

torch.optim.Muon iterates in bfloat16, which processors without bf16 arithmetic emulate a hundred times slower; this one
iterates in bfloat16 only where the hardware multiplies it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from studio.training.precision import has_native_bf16


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T of the singular value decomposition of a matrix (m, n), by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """For hidden matrices only (no embeddings, heads or vectors), at an AdamW-like learning rate.

    Args:
        params: parameters with two or more dimensions; a convolution counts as (outputs, everything else).
        lr: learning rate; the update is scaled by `0.2 sqrt(max(m, n))` so that its size matches AdamW's.
        momentum: Nesterov momentum.
        weight_decay: decoupled decay.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                if has_native_bf16():
                    direction = direction.bfloat16()
                update = orthogonalize(direction).to(p).view(p.shape)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(direction.shape) ** 0.5)


def muon_and_adamw(
    module: torch.nn.Module,
    matrices: Sequence[torch.Tensor],
    learning_rate: float,
    adamw_share: float = 0.3,
    weight_decay: float = 0.05,
    tables: Sequence[torch.Tensor] = (),
    tables_share: float = 10.0,
) -> list[torch.optim.Optimizer]:
    """Muon for the given hidden matrices of a module, and AdamW at a share of its rate for all other parameters.

    Args:
        module: whose parameters are trained.
        matrices: the parameters for Muon, such as `hidden_matrices` of its inner part.
        learning_rate: Muon's.
        adamw_share: AdamW's learning rate over Muon's.
        weight_decay: decoupled decay of every matrix; vectors and tables have none.
        tables: parameters with a rate of their own, such as embeddings of which a batch reads few rows, which have to
            move when they are read.
        tables_share: their learning rate, by AdamW, over Muon's.

    Returns:
        `[Muon, AdamW]`.
    """
    chosen = {id(p) for p in (*matrices, *tables)}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if tables:
        groups.append({"params": list(tables), "weight_decay": 0.0, "lr": learning_rate * tables_share})
    return [
        Muon(matrices, lr=learning_rate, weight_decay=weight_decay),
        torch.optim.AdamW(groups, lr=learning_rate * adamw_share, betas=(0.9, 0.95)),
    ]


def hidden_matrices(*modules: torch.nn.Module) -> list[torch.Tensor]:
    """Weights of every linear layer and convolution inside the modules."""
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    return [part.weight for module in modules for part in module.modules() if isinstance(part, layers)]
