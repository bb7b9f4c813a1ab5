"""Attention scores of a vision tower, read off while it runs: hooks, any attention backend, no weight access.

The tower may be shared by threads: a hook records only the calls of the context that entered its tap.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar

import torch

from studio.pruning.attention import Attention, cls_logits, cls_probabilities, mean_query_logits, received_attention

_ENTERED: ContextVar["_Tap | None"] = ContextVar("tap", default=None)


class _Tap:
    """A context in which `self.hooks()`, handles of hooks that first ask `self.entered()`, are on their modules."""

    def __enter__(self):
        with ExitStack() as handles:
            for handle in self.hooks():
                handles.callback(handle.remove)
            self._handles = handles.pop_all()
        self._outer = _ENTERED.set(self)
        return self

    def __exit__(self, *exception):
        _ENTERED.reset(self._outer)
        self._handles.close()

    def entered(self) -> bool:
        return _ENTERED.get() is self


class TowerTap(_Tap):
    """A context in which a CLIP or SigLIP tower records queries and keys of the layers that some scores need.

    Args:
        tower: the vision model; its layers are the modules with `q_proj` and `k_proj`, in order.
        names: fields of `Attention` to compute.
        feature_layer: index into the tower's hidden states that the features come from; its layer gives `last`.
        has_cls: whether token 0 is CLS. Without it `first` and `last` are received attention, `logits` those of the
            mean query.
    """

    def __init__(self, tower: torch.nn.Module, names: tuple[str, ...], *, feature_layer: int, has_cls: bool):
        layers = [module for module in tower.modules() if hasattr(module, "q_proj") and hasattr(module, "k_proj")]
        number = {"first": 0, "last": max(feature_layer % (len(layers) + 1) - 1, 0), "logits": len(layers) - 1}
        self.layers = {name: layers[number[name]] for name in names}
        self.has_cls = has_cls
        self.seen: dict[tuple[torch.nn.Module, str], torch.Tensor] = {}

    def hooks(self):
        for layer in set(self.layers.values()):
            for part in ("q_proj", "k_proj"):
                yield getattr(layer, part).register_forward_hook(self._record(layer, part))

    def _record(self, layer, part):
        only_first = self.has_cls and part == "q_proj"

        def hook(module, arguments, output):
            if self.entered():
                self.seen[layer, part] = (output[:, :1] if only_first else output).detach()

        return hook

    def scores(self, partitions: list[int]) -> list[Attention]:
        """One `Attention` for each image, given how many runs of the tower each has, in order."""
        found = {}
        for name, layer in self.layers.items():
            if name == "logits":
                score: Callable = cls_logits if self.has_cls else mean_query_logits
            else:
                score = cls_probabilities if self.has_cls else received_attention
            whole = score(self.seen[layer, "q_proj"], self.seen[layer, "k_proj"], layer.num_heads, layer.scale)
            found[name] = whole.split(partitions)
        return [Attention(**{name: parts[i] for name, parts in found.items()}) for i in range(len(partitions))]


class QwenTap(_Tap):
    """A context in which a Qwen vision tower records received attention of its last layer with full attention.

    Queries and keys are rotated as the tower does it, each image attends to itself alone, the patches that are merged
    into one token are added up, and the order of windows (Qwen2.5-VL) is undone.
    """

    def __init__(self, tower: torch.nn.Module, grid_thw: torch.Tensor):
        full = getattr(tower, "fullatt_block_indexes", None) or [len(tower.blocks) - 1]
        self.tower, self.grid_thw, self.attention = tower, grid_thw, tower.blocks[max(full)].attn
        self.received: list[torch.Tensor] = []

    def hooks(self):
        yield self.attention.register_forward_pre_hook(self._record, with_kwargs=True)

    @torch.no_grad()
    def _record(self, attention, arguments, keywords):
        if not self.entered():
            return
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        queries, keys, _ = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        queries, keys = (part.flatten(1) for part in rotate(queries, keys, *keywords["position_embeddings"]))
        lengths = self.grid_thw.prod(-1).tolist()
        self.received = [
            received_attention(q[None], k[None], attention.num_heads, attention.scaling)[0]
            for q, k in zip(queries.split(lengths), keys.split(lengths))
        ]

    def scores(self) -> list[Attention]:
        """One `Attention` for each image, all fields the same map (1, tokens)."""
        tower, unit = self.tower, self.tower.spatial_merge_size**2
        merged = torch.cat(self.received).view(-1, unit).sum(dim=1)
        if hasattr(tower, "window_size"):
            windows, _ = sys.modules[type(tower).__module__].get_vision_window_index(
                self.grid_thw,
                spatial_merge_size=tower.spatial_merge_size,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )
            merged = merged[torch.argsort(windows.to(merged.device))]
        maps = merged.split((self.grid_thw.prod(-1) // unit).tolist())
        return [Attention(first=part[None], last=part[None], logits=part[None]) for part in maps]
