"""Reverse steps of a diffusion-loss head in C (`native.c`) for CPUs: a step, guidance included, is one call.

A step over a few tokens is a few dozen operations on small matrices. Started one by one from Python, their overhead
exceeds their work. Weights that are exact in bfloat16 are read as such, as in `studio.backends.cpu_c`.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from studio.backends.cpu_c import are_bfloat16, pack, pointers
from studio.backends.native_library import library, loaded_library
from studio.models.diffusion_head import DenoisingNetwork

_LANES, _ROWS_AT_ONCE = 8, 48


class _Head(ctypes.Structure):
    """The struct `Head` of native.c; a list has an entry per block."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (  # type: ignore[assignment]  # typeshed lists the simple types
        [(name, ctypes.c_int32) for name in ("token", "width", "depth", "bf16")]
        + [("eps", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("input", "output", "first", "second")]
        + [(name, ctypes.c_void_p) for name in ("input_bias", "output_bias", "first_bias", "second_bias")]
        + [(name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias")]
    )


class _Denoising(ctypes.Structure):
    """The struct `Denoising` of native.c."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (  # type: ignore[assignment]  # typeshed lists the simple types
        [(name, ctypes.c_int32) for name in ("steps", "copies", "tokens", "threads")]
        + [(name, ctypes.c_int64) for name in ("step_rows", "copy_rows")]
        + [(name, ctypes.c_void_p) for name in ("x", "modulated", "scales", "table")]
        + [("limit", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("mean", "log_std")]
    )


def can_denoise(network: DenoisingNetwork) -> bool:
    """Whether this network runs in C on this machine.

    This needs float32 weights on a CPU, sizes that are multiples of 8, and a working compiler.
    """
    weight = network.input_proj.weight
    fits = not len(weight) % _LANES and not 2 * weight.shape[1] % _LANES
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and fits and library() is not None


class NativeHead:
    """The `denoise` of a `DenoisingNetwork` for which `can_denoise` is true; results differ by rounding only.

    The modulations are computed by the network itself.
    """

    @torch.no_grad()
    def __init__(self, network: DenoisingNetwork):
        self._run = loaded_library().studio_denoise
        blocks: Any
        blocks, ends = network.res_blocks, (network.input_proj, network.final_layer.linear)
        layers = [[block.mlp[0] for block in blocks], [block.mlp[2] for block in blocks]]
        norms = [block.in_ln for block in blocks]
        bf16 = are_bfloat16(*(layer.weight for layer in (*layers[0], *layers[1], *ends)))
        self._kept = {
            "input": [pack(ends[0].weight, bf16)],
            "output": [pack(ends[1].weight, bf16)],
            "first": [pack(layer.weight, bf16) for layer in layers[0]],
            "second": [pack(layer.weight, bf16) for layer in layers[1]],
            "input_bias": [_copy(ends[0].bias)],
            "output_bias": [_copy(ends[1].bias)],
            "first_bias": [_copy(layer.bias) for layer in layers[0]],
            "second_bias": [_copy(layer.bias) for layer in layers[1]],
            "norm_weight": [_copy(norm.weight) for norm in norms],
            "norm_bias": [_copy(norm.bias) for norm in norms],
        }
        self._lists = {name: pointers(group) for name, group in self._kept.items()}
        single = {name for name in self._kept if name.startswith(("input", "output"))}
        self.width, self.token = ends[0].weight.shape
        self._head = _Head(
            token=self.token, width=self.width, depth=len(blocks), bf16=bf16, eps=network.final_layer.norm_final.eps,
            **{
                name: group[0] if name in single else ctypes.addressof(group)
                for name, group in self._lists.items()
            },
        )  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        modulated: list[torch.Tensor],
        scales: torch.Tensor,
        table: torch.Tensor,
        limit: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation (t, m, D) of the reverse steps from x, as of `ReverseTransitions.along`.

        Args:
            x: states (t, m, D) at t steps.
            modulated: modulations of each block and the last layer, (t, S, n, numbers), of which the first m tokens
                are used; S is 2 with guidance, conditional then unconditional.
            scales: guidance scales (m,).
            table: rows of `GaussianDiffusion.table`, (t, 6).
            limit: of `GaussianDiffusion`.
        """
        steps, tokens, _ = x.shape
        _, copies, rows, _ = modulated[0].shape
        x, modulated = x.contiguous(), [part.contiguous() for part in modulated]
        mean, log_std = torch.empty_like(x), torch.empty_like(x)
        states = steps * copies * tokens
        scratch = torch.empty(3 * _ROWS_AT_ONCE * max(self.width, self.token) + 2 * states * self.token)
        parts = pointers(modulated)
        call = _Denoising(
            steps, copies, tokens, torch.get_num_threads(), copies * rows, rows, x.data_ptr(),
            ctypes.addressof(parts), scales.data_ptr(), table.data_ptr(), limit or 0.0, mean.data_ptr(),
            log_std.data_ptr(),
        )  # fmt: skip
        self._run(ctypes.byref(self._head), ctypes.byref(call), scratch.data_ptr())
        return mean, log_std


def _copy(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().clone()
