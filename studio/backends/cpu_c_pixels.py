"""Convolutional decoders of image tokenizers in C (`native_pixels.h`) for CPUs: an image is one call.

Images are stored channels last, and stay in the cache from layer to layer: a norm with its activation is two passes, a
convolution with its bias and residual one. Weights that are exact in bfloat16 are read as such; all arithmetic is
float32, because in bfloat16 some pixels are off by more than half a grey level.
"""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from studio.backends.cpu_c import are_bfloat16, pack
from studio.backends.native_library import library, loaded_library
from studio.tokenizers import latent_autoencoder, vq
from studio.tokenizers.maskgit_decoder import MaskGITDecoder, MaskGITResBlock

_LANES, _QUERIES = 8, 4
_CONVOLVE, _SPREAD, _MEASURE, _NORMALISE, _ATTEND = range(5)
_MAIN, _OTHER, _BORDERED, _FLAT, _QUERY, _KEY, _VALUE, _BUFFERS = range(8)
_DECODERS = (vq.Decoder, latent_autoencoder.Decoder, MaskGITDecoder)
_MODULES = (nn.Conv2d, nn.GroupNorm, nn.ModuleList)


class _Layer(ctypes.Structure):
    """The struct `Layer` of native_pixels.h."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (  # type: ignore[assignment]  # typeshed lists the simple types
        [(name, ctypes.c_int32) for name in ("kind", "source", "target", "inputs", "outputs", "scale", "lines", "add")]
        + [(name, ctypes.c_int32) for name in ("bf16", "factor", "groups")]
        + [("eps", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in ("weights", "gain", "bias")]
    )


class _Image(ctypes.Structure):
    """The struct `Image` of native_pixels.h."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (  # type: ignore[assignment]  # typeshed lists the simple types
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("count", "height", "width", "threads")),
        *(("buffers", ctypes.c_void_p * _BUFFERS), ("measures", ctypes.c_void_p), ("scratch", ctypes.c_void_p)),
        ("own", ctypes.c_int64),
    )


def can_decode(decoder: nn.Module) -> bool:
    """Whether this decoder runs in C on this machine: a known one in float32 on a CPU, and a working compiler."""
    if type(decoder) not in _DECODERS or library() is None:
        return False
    known = all(
        type(module) in _MODULES or type(module).__module__.startswith("studio.tokenizers.")
        for module in decoder.modules()
    )
    attention = [module for module in decoder.modules() if hasattr(module, "proj_out")]
    fits = all(type(module) is vq.AttentionBlock and not module.q.in_channels % _LANES for module in attention)
    return known and fits and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in decoder.parameters())


class NativeDecoder(nn.Module):
    """The call of a decoder for which `can_decode` is true; results differ by rounding only.

    The images of a batch are decoded one after the other, so a batch equals its single calls.
    """

    @torch.no_grad()
    def __init__(self, decoder: Any):
        super().__init__()
        self._layers: list[_Layer] = []
        self._kept: list[torch.Tensor] = []
        self._scale, self._main, self._other = 1, _MAIN, _OTHER
        self._inputs, self._outputs = decoder.conv_in.in_channels, decoder.conv_out.out_channels
        self._append(_SPREAD, _MAIN, _BORDERED, self._inputs, factor=1)
        self._convolve(decoder.conv_in, _BORDERED, _MAIN)
        kind = type(decoder)
        if kind is MaskGITDecoder:
            self._maskgit(decoder)
        elif kind is vq.Decoder:
            self._parts(decoder.mid)
            for level in decoder.conv_blocks:
                self._level(level.res, level.attn, level)
        else:
            self._parts((decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2))
            for level in reversed(decoder.up):
                self._level(level.block, level.attn, level)
        self._normalise(decoder.norm_out, self._main, _BORDERED)
        self._convolve(decoder.conv_out, _BORDERED, self._other)
        self._swap()
        self._program = (_Layer * len(self._layers))(*self._layers)
        self._run = loaded_library().studio_decode

    def _append(self, kind: int, source: int, target: int, inputs: int, **more: Any) -> None:
        given = {"outputs": inputs, "scale": self._scale, **more}
        self._layers.append(_Layer(kind=kind, source=source, target=target, inputs=inputs, **given))

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _swap(self) -> None:
        self._main, self._other = self._other, self._main

    def _convolve(
        self, layer: nn.Conv2d, source: int, target: int, add: bool = False, weight: torch.Tensor | None = None
    ) -> None:
        weight = layer.weight.detach() if weight is None else weight
        outputs, inputs, lines, _ = weight.shape
        padding = -inputs % _LANES
        rows = nn.functional.pad(weight.permute(0, 2, 3, 1), (0, padding)).flatten(1)
        bf16 = are_bfloat16(rows)
        packed = pack(rows, bf16)
        bias = torch.zeros(packed.shape[0] * packed.shape[2])
        if layer.bias is not None:
            bias[:outputs] = layer.bias.detach()
        weights, gains = self._keep(packed), self._keep(bias)
        self._append(
            _CONVOLVE, source, target, inputs, outputs=outputs, lines=lines, add=add, bf16=bf16, weights=weights,
            bias=gains,
        )  # fmt: skip

    def _normalise(self, norm: nn.GroupNorm, source: int, target: int) -> None:
        gain, bias = (self._keep(values.detach().clone()) for values in (norm.weight, norm.bias))
        self._append(_MEASURE, source, source, norm.num_channels)
        self._append(
            _NORMALISE, source, target, norm.num_channels, groups=norm.num_groups, eps=norm.eps, gain=gain, bias=bias
        )

    def _parts(self, blocks: Iterable[Any]) -> None:
        for block in blocks:
            if isinstance(block, vq.AttentionBlock):
                self._attention(block)
            else:
                self._res_block(block)

    def _level(self, blocks: Sequence[Any], attention: Sequence[Any], level: Any) -> None:
        for index, block in enumerate(blocks):
            self._parts((block, attention[index]) if len(attention) else (block,))
        if hasattr(level, "upsample"):
            self._upsample(level.upsample.conv)

    def _maskgit(self, decoder: Any) -> None:
        self._parts(decoder.mid)
        for level in reversed(decoder.up):
            self._parts(level.block)
            if hasattr(level, "upsample_conv"):
                self._upsample(level.upsample_conv)

    def _upsample(self, layer: nn.Conv2d) -> None:
        self._scale *= 2
        self._append(_SPREAD, self._main, _BORDERED, layer.in_channels, factor=2)
        self._convolve(layer, _BORDERED, self._other)
        self._swap()

    def _res_block(self, block: Any) -> None:
        self._normalise(block.norm1, self._main, _BORDERED)
        self._convolve(block.conv1, _BORDERED, self._other)
        self._normalise(block.norm2, self._other, _BORDERED)
        shortcut = getattr(block, "nin_shortcut", None)
        if shortcut is None:
            self._convolve(block.conv2, _BORDERED, self._main, add=True)
        elif isinstance(block, MaskGITResBlock):
            self._convolve(block.conv2, _BORDERED, self._other)
            one = torch.eye(shortcut.out_channels)[:, :, None, None]
            self._convolve(shortcut, self._other, self._main, weight=shortcut.weight.detach() + one)
        else:
            self._convolve(shortcut, self._main, self._other)
            self._convolve(block.conv2, _BORDERED, self._other, add=True)
            self._swap()

    def _attention(self, block: vq.AttentionBlock) -> None:
        self._normalise(block.norm, self._main, _FLAT)
        for layer, target in ((block.q, _QUERY), (block.k, _KEY), (block.v, _VALUE)):
            self._convolve(layer, _FLAT, target)
        self._append(_ATTEND, _QUERY, _FLAT, block.q.out_channels)
        self._convolve(block.proj_out, _FLAT, self._main, add=True)

    def _sizes(self, height: int, width: int) -> tuple[list[int], int, int]:
        """Numbers of each buffer, of the measures and of a thread's own."""
        sizes, measures, own = [0] * _BUFFERS, 0, 0
        sizes[_MAIN] = height * width * _filled(self._inputs)
        for layer in self._layers:
            rows, columns = height * layer.scale, width * layer.scale
            border = 2 if layer.target == _BORDERED else 0
            numbers = (rows + border) * (columns + border) * _filled(layer.outputs)
            sizes[layer.target] = max(sizes[layer.target], numbers)
            measures = max(measures, 2 * rows * _filled(layer.inputs))
            own = max(own, 2 * _filled(layer.inputs))
            if layer.kind == _ATTEND:
                own = max(own, _QUERIES * (rows * columns + _LANES))
        return sizes, measures, own

    @torch.no_grad()
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Images (B, channels, H, W) of features (B, features, h, w)."""
        batch, channels, height, width = features.shape
        sizes, measures, own = self._sizes(height, width)
        threads = torch.get_num_threads()
        scratch = torch.empty(sum(sizes) + measures + threads * own)
        parts = scratch.split([*sizes, measures, threads * own])
        addresses = [part.data_ptr() for part in parts]
        call = _Image(
            ctypes.addressof(self._program), len(self._program), height, width, threads,
            (ctypes.c_void_p * _BUFFERS)(*addresses[:_BUFFERS]), *addresses[_BUFFERS:], own,
        )  # fmt: skip
        rows, columns, stride = height * self._scale, width * self._scale, _filled(self._outputs)
        images = torch.empty(batch, rows, columns, self._outputs)
        given = parts[_MAIN][: height * width * _filled(channels)].view(height, width, _filled(channels))
        found = parts[self._main][: rows * columns * stride].view(rows, columns, stride)
        for image, each in zip(images, features):
            given[:, :, channels:] = 0
            given[:, :, :channels] = each.permute(1, 2, 0)
            self._run(ctypes.byref(call), self._work(height, width))
            image.copy_(found[:, :, : self._outputs])
        return images.permute(0, 3, 1, 2)

    def _work(self, height: int, width: int) -> int:
        """Multiplications of a convolution, on average."""
        convolutions = [layer for layer in self._layers if layer.kind == _CONVOLVE]
        numbers = sum(l.scale**2 * l.inputs * l.outputs * l.lines**2 for l in convolutions)  # noqa: E741
        return numbers * height * width // len(convolutions)


def _filled(channels: int) -> int:
    return -(-channels // _LANES) * _LANES
