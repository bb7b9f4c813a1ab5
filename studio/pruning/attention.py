"""How much a vision tower looks at each token: rows of its attention, from the queries and keys of one layer.

Nothing here needs `output_attentions` or the eager backend: hooks record queries and keys while the tower runs, and
only the rows of attention that a score needs are computed, in float32. Threads may share the tower: a hook records only
the calls of the context that entered its tap.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from studio.errors import StudioError
from studio.pruning.blocks import with_keywords
from studio.pruning.layout import Layout
from studio.pruning.merging import expanded

_BLOCK = 256
_SHALLOW = 5


@dataclass(frozen=True, eq=False)
class Attention:
    """Scores of the tokens of one image, each (P, N): P partitions (0 the thumbnail) of N tokens.

    Args:
        first: attention of the CLS token in the first layer, after softmax, summed over heads (HiRED).
        last: the same in the layer whose output becomes the features (HiRED).
        logits: query-key products of the CLS token in the last layer, before softmax, mean over heads (GlobalCom2).
        shallow: as `first`, in the sixth layer (VScan).
        unmerged: (T, C), no scores: features before the patches of a token are merged, mean over them (Cen-Prune).
    """

    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    shallow: torch.Tensor | None = None
    unmerged: torch.Tensor | None = None


def cls_logits(queries: torch.Tensor, keys: torch.Tensor, heads: int, scale: float | None = None) -> torch.Tensor:
    """Scaled products of the CLS query with every other key, before softmax, mean over heads.

    Args:
        queries: (P, any number, D) projections; only the first, of the CLS token, is used.
        keys: (P, 1 + N, D) projections, CLS first.
        heads: attention heads.
        scale: factor of the queries; 1 / sqrt(D / heads) when `None`.

    Returns:
        (P, N) float32.

    Raises:
        StudioError: heads do not divide D or the shapes differ.
    """
    return _first_rows(queries, keys, heads, scale).mean(dim=1)[:, 1:]


def cls_probabilities(
    queries: torch.Tensor,
    keys: torch.Tensor,
    heads: int,
    scale: float | None = None,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the CLS token to every other, summed over heads; arguments and result as in `cls_logits`.

    The softmax runs over all keys, CLS included; its column is dropped afterwards. A key counts as often as `sizes`
    (P, 1 + N) says.
    """
    rows = _first_rows(queries, keys, heads, scale)
    rows = rows if sizes is None else rows + sizes.float().log()[:, None]
    return rows.softmax(dim=-1).sum(dim=1)[:, 1:]


def received_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    heads: int,
    scale: float | None = None,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention each token receives, mean over all queries and heads: a stand-in for CLS where a tower has none.

    Computed in blocks of queries, so that memory grows with N and not with its square.

    Args:
        queries, keys: (P, N, D) projections, rotated where the tower does so.
        heads: attention heads.
        scale: factor of the queries; 1 / sqrt(D / heads) when `None`.
        sizes: how often each token counts, as key and as query, (P, N); once when `None`.

    Returns:
        (P, N) float32; each row adds up to 1.

    Raises:
        StudioError: heads do not divide D or the shapes differ.
    """
    queries, keys = _by_head(queries, heads), _by_head(keys, heads)
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    received = keys.new_zeros(keys.shape[0], keys.shape[2])
    sizes = torch.ones_like(received) if sizes is None else sizes.float()
    for block, often in zip(queries.split(_BLOCK, dim=2), sizes.split(_BLOCK, dim=1)):
        rows = (block * scale @ keys.transpose(-1, -2) + sizes.log()[:, None, None]).softmax(dim=-1)
        received += torch.einsum("phqk,pq->pk", rows, often)
    return received / (heads * sizes.sum(dim=1, keepdim=True))


def mean_query_logits(
    queries: torch.Tensor, keys: torch.Tensor, heads: int, scale: float | None = None
) -> torch.Tensor:
    """Products of the mean query with every key, before softmax, mean over heads: `cls_logits` without a CLS token.

    Arguments and result as in `received_attention`; the values may be negative.
    """
    return _first_rows(queries.float().mean(dim=1, keepdim=True), keys, heads, scale).mean(dim=1)


def _by_head(projections: torch.Tensor, heads: int) -> torch.Tensor:
    if projections.dim() != 3 or projections.shape[-1] % heads:
        raise StudioError(f"Give projections as (P, N, D) with D divisible by {heads} heads.")
    return projections.float().unflatten(-1, (heads, -1)).transpose(1, 2)


def _first_rows(queries, keys, heads, scale) -> torch.Tensor:
    queries, keys = _by_head(queries[:, :1], heads), _by_head(keys, heads)
    if queries.shape[0] != keys.shape[0] or queries.shape[-1] != keys.shape[-1]:
        raise StudioError("Queries and keys must be of the same partitions and width.")
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return (queries * scale @ keys.transpose(-1, -2)).squeeze(2)


def scores_for(method: str, name: str, attention: Attention | None, layout: Layout) -> torch.Tensor:
    """The scores `name` of an `Attention`, (P, N) float32 on the CPU, for the partitions of `layout`.

    Raises:
        StudioError: they are missing, of another shape, or the layout has lost its grid.
    """
    scores = getattr(attention, name, None)
    if scores is None:
        raise StudioError(f"{method} needs attention: give attention=Attention({name}=...).")
    if layout.partition.max() >= layout.partitions:
        raise StudioError(f"{method} needs crops as the vision tower made them, but here the model shrank them.")
    expected = (layout.partitions, layout.size[0] * layout.size[1])
    if tuple(scores.shape) != expected:
        raise StudioError(f"{method} needs scores of shape {expected} for this layout, not {tuple(scores.shape)}.")
    return scores.detach().float().cpu()


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

    Layers behind the features and the scores, which nothing reads, get a single token: published LLaVAs take their
    features one layer before the last. Hidden states of such layers say nothing.

    Args:
        tower: the vision model; its attentions are the modules with `q_proj` and `k_proj`, in order.
        names: fields of `Attention` to compute.
        feature_layer: index into the tower's hidden states that the features come from; its layer gives `last`.
        read_layers: all such indices, where features come from several.
        has_cls: whether token 0 is CLS. Without it `logits` are those of the mean query, and the others received
            attention.
    """

    def __init__(
        self,
        tower: torch.nn.Module,
        names: tuple[str, ...],
        *,
        feature_layer: int,
        has_cls: bool,
        read_layers: Sequence[int] = (),
    ):
        blocks = [part for part in tower.modules() if hasattr(getattr(part, "self_attn", None), "k_proj")]
        number = {"first": 0, "last": self._number(feature_layer, len(blocks)), "logits": len(blocks) - 1}
        number["shallow"] = min(_SHALLOW, len(blocks) - 1)
        self.layers: dict[str, Any] = {name: blocks[number[name]].self_attn for name in names}
        read = [self._number(layer, len(blocks)) for layer in (feature_layer, *read_layers)]
        self.unread = blocks[1 + max([*read, *(number[name] for name in names)]) :]
        self.has_cls = has_cls
        self.seen: dict[tuple[torch.nn.Module, str], torch.Tensor] = {}

    @staticmethod
    def _number(hidden_state: int, layers: int) -> int:
        """The layer whose output a hidden state is; the first for the states before it."""
        return max(hidden_state % (layers + 1) - 1, 0)

    def hooks(self) -> Iterator[RemovableHandle]:
        for layer in set(self.layers.values()):
            for part in ("q_proj", "k_proj"):
                yield getattr(layer, part).register_forward_hook(self._record(layer, part))
        for unread in self.unread:
            yield unread.register_forward_pre_hook(with_keywords(self._one_token, 2), with_kwargs=True)
            yield unread.register_forward_hook(self._all_tokens, prepend=True)  # before states are captured

    def _one_token(self, layer, arguments, keywords):
        if not self.entered():
            return None
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        self.tokens = hidden.shape[1]
        others = {name: value for name, value in keywords.items() if name not in ("hidden_states", "attention_mask")}
        return (hidden[:, :1], None, *arguments[2:]), others

    def _all_tokens(self, layer, arguments, output):
        return output.expand(-1, self.tokens, -1) if self.entered() else None

    def _record(self, layer, part):
        only_first = self.has_cls and part == "q_proj"

        def hook(module, arguments, output):
            if self.entered():
                self.seen[layer, part] = (output[:, :1] if only_first else expanded(output, layer)).detach()

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

    For `unmerged` it records what goes into its merger instead.

    Queries and keys are rotated as the tower does it, each image attends to itself alone, the patches that are merged
    into one token are added up, and the order of windows (Qwen2.5-VL) is undone.
    """

    def __init__(self, tower: Any, names: tuple[str, ...], grid_thw: torch.Tensor):
        self.unmerged, self.merged = "unmerged" in names, torch.empty(0)
        full = getattr(tower, "fullatt_block_indexes", None) or [len(tower.blocks) - 1]
        self.tower, self.grid_thw, self.attention = tower, grid_thw, tower.blocks[max(full)].attn
        self.received: list[torch.Tensor] = []

    def hooks(self) -> Iterator[RemovableHandle]:
        if self.unmerged:
            yield self.tower.merger.register_forward_pre_hook(self._record_features)
        else:
            yield self.attention.register_forward_pre_hook(with_keywords(self._record, 2), with_kwargs=True)

    def _record_features(self, merger, arguments):
        if self.entered():
            tokens = int(self.grid_thw.prod(-1).sum()) // self.tower.spatial_merge_size**2
            self.merged = arguments[0].detach().float().unflatten(0, (tokens, -1)).mean(dim=1)

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
        merged = self.merged if self.unmerged else torch.cat(self.received).view(-1, unit).sum(dim=1)
        if hasattr(tower, "window_size"):
            windows, _ = sys.modules[type(tower).__module__].get_vision_window_index(
                self.grid_thw,
                spatial_merge_size=tower.spatial_merge_size,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )
            merged = merged[torch.argsort(windows.to(merged.device))]
        maps = merged.split((self.grid_thw.prod(-1) // unit).tolist())
        if self.unmerged:
            return [Attention(unmerged=part) for part in maps]
        return [Attention(first=part[None], last=part[None], logits=part[None]) for part in maps]
