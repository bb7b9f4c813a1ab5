"""Compression of the KV cache: all layers read the whole prompt, then each keeps a part of the image's keys and values.

Scores come from queries and keys of each layer, in blocks of queries, so no attention matrix of the whole prompt is
materialised and any attention backend works. Text always stays; of the image tokens exactly `keep` stay in each layer
(for `prefixkv` on average over layers), and the memory of the others is freed.

- `coverage`: the tokens that cover the others best, the same in all layers (`studio.pruning.scope`); needs no scores.
- `coverage-merge`, our combination: as `coverage`, by what the third layer reads, where a token knows its surroundings;
  all others are merged as in `lookm`.
- `snapkv` (arXiv:2404.14469): attention of the prompt's last 32 tokens, smoothed over 5 positions, for each head.
- `h2o` (arXiv:2306.14048): half the latest, half those with the most attention received from all queries, for each
  head. Decoding evicts nothing more, unlike in the paper.
- `prefixkv` (arXiv:2412.03409): attention received, one share of it for all layers, so that layers keep different
  numbers of tokens.
- `kvcrush` (arXiv:2503.00022): 3/4 by the scores of `snapkv`; of the others, sorted by how many heads disagree with the
  majority on whether a token is in their upper half, evenly spaced ones.
- `ems` and `lookm`, which merge tokens that go into tokens that stay (see `studio.pruning.cache_merging`).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from studio.checks import shown
from studio.errors import StudioError
from studio.pruning.adapters import Family, family_of
from studio.pruning.blocks import block, with_keywords
from studio.pruning.budget import count
from studio.pruning.cache_merging import Merged, ems, lookm
from studio.pruning.columns import ShortLayer
from studio.pruning.inside_model import Call, Inside, layers_of, rotated, windowless
from studio.pruning.registry import IN_CACHE
from studio.pruning.scope import coverage_order
from studio.pruning.shortening import PruneInfo, PruneRecord

MERGING: dict[str, Callable[..., Merged]] = {"ems": ems, "lookm": lookm, "coverage-merge": lookm}
_WINDOW, _POOL, _BLOCK = 32, 5, 256
_COVERED_AT = {"coverage": 0, "coverage-merge": 2}
"""The layer whose input is covered."""
_OWN = {"keys", "values", "scores", "wanted"}


@contextmanager
def compress(model: PreTrainedModel, method: str, keep: float = 0.05, **options: Any) -> Iterator[PruneRecord]:
    """A block in which the KV cache drops most image tokens as soon as a prompt is read.

        with studio.compress(model, "coverage", keep=0.05) as record:
            out = model.generate(**inputs, max_new_tokens=50)

    The first new token is that of the whole prompt. A cache made here is read inside such a block only; threads, tasks
    and wrappers are as with `studio.prune`.

    Args:
        model: a vision-language model of transformers (see `studio.pruning.adapters.FAMILIES`).
        method: "coverage", "coverage-merge", "snapkv", "h2o", "prefixkv", "kvcrush", "ems" or "lookm".
        keep: the fraction in (0, 1] of each prompt's image tokens that each layer keeps, or a whole number of them;
            tokens that the attention mask hides go and do not count.
        options: settings of "ems", "lookm" and "coverage-merge" (those of "lookm"), such as `merge` (see
            `studio.pruning.cache_merging`).

    Yields:
        A `PruneRecord`; the info of a prompt has `kept` for "coverage" and "coverage-merge" only: elsewhere heads keep
        different tokens.

    Raises:
        StudioError: an unknown method or option, a model that is not supported (with the reason), a block of `prune`
            around it, and calls whose cache cannot shrink.
    """
    if method not in IN_CACHE:
        raise StudioError(f"The method of the cache is one of {', '.join(IN_CACHE)}, not {shown(method)}.")
    known = set(inspect.signature(MERGING[method]).parameters) - _OWN if method in MERGING else set()
    if unknown := set(options) - known:
        allowed = f"takes {', '.join(sorted(known))}" if known else "has no settings"
        raise StudioError(f"{method} {allowed}, not {', '.join(sorted(unknown))}.")
    count(keep, 1)
    record = PruneRecord()
    inside = Compressing(family_of(model, "uniform"), method, keep, record, options)
    methods: dict[str, Callable] = {"forward": inside.forward, "generate": inside.generate}
    with inside.hooks(), block(inside.family.model, methods, "studio.compress"):
        yield record


class Compressing(Inside):
    """The hooks of one `compress` block."""

    def __init__(self, family: Family, method: str, keep: float, record: PruneRecord, options: dict):
        self.family, self.method, self.keep, self.record, self.options = family, method, keep, record, options
        windowless(family)
        self.check_queries(method not in _COVERED_AT)
        self.covered_at = min(_COVERED_AT.get(method, 0), len(layers_of(family)) - 1)
        text = family.model.config.get_text_config()
        if method in MERGING and "flash" in (getattr(text, "_attn_implementation", None) or ""):
            raise StudioError(f"{method} adds to the logits of attention: load the model with sdpa or eager attention.")
        self.call = CompressingCall

    def handles(self) -> Iterator[RemovableHandle]:
        yield from super().handles()
        for number, layer in enumerate(layers_of(self.family)):
            yield layer.get_submodule("self_attn").register_forward_hook(
                with_keywords(self._read(number), 3), with_kwargs=True
            )

    def _read(self, number: int):
        def hook(attention, arguments, keywords, output):
            call = self.current()
            if call is not None and call.image is not None:
                call.read(number, arguments, keywords)

        return hook


class CompressingCall(Call):
    """One call of the model: a prompt whose cache is cut when it has been read, or what follows it."""

    def __init__(self, inside: Inside, keywords: dict):
        super().__init__(inside, keywords)
        if self.image is not None:
            seen = (self.image & self.valid).sum(dim=1).tolist()
            self.wanted = [count(inside.keep, tokens) if tokens else 0 for tokens in seen]
            self.scores: dict[int, torch.Tensor] = {}
            self.places: list[torch.Tensor] = []

    def cut(self, number: int, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        if self.inside.method in _COVERED_AT and number == self.inside.covered_at:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            self.places = [
                places[coverage_order(hidden[row, places], self.wanted[row])] if len(places) else places
                for row, places in enumerate(map(_places, self.image & self.valid))
            ]
        return arguments, keywords

    @torch.no_grad()
    def read(self, number: int, arguments: tuple, keywords: dict) -> None:
        """Scores a layer whose keys are in the cache, and cuts it; `prefixkv` cuts when all are scored."""
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        method, keys = self.inside.method, self.cache.layers[number].keys
        if method == "coverage":
            self._hold(number, [[places] * keys.shape[1] for places in self.places])
            return
        if method == "coverage-merge":
            if number >= self.inside.covered_at:
                self._merge_into_covering(number)
            return
        window = _WINDOW if method in ("snapkv", "kvcrush") else hidden.shape[1]
        received = self._received(number, hidden, keywords["position_embeddings"], keys, window)
        if method == "prefixkv":
            self.scores[number] = received.mean(dim=1)
            return
        if method == "ems":
            latest = self._received(number, hidden, keywords["position_embeddings"], keys, _WINDOW)
            self._merge(number, self._global_or_local(received, _smooth(latest)))
            return
        if method == "lookm":
            self._merge(number, received)
            return
        if method != "h2o":
            received = _smooth(received)
        choose = {"snapkv": _heaviest, "h2o": _heavy_and_recent, "kvcrush": _crushed}[method]
        images = map(_places, self.image & self.valid)
        self._hold(number, [choose(received[row], places, self.wanted[row]) for row, places in enumerate(images)])

    def _received(self, number: int, hidden, rotary, keys, window: int) -> torch.Tensor:
        """(B, key heads, L) float32: attention from the last `window` queries of each row, mean over grouped heads."""
        attention: Any = layers_of(self.inside.family)[number].self_attn
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        since = self.last[:, None] + 1 - window
        asks = self.valid & (columns > since - 1)
        received = torch.zeros(keys.shape[:3], device=keys.device)
        for rows in columns.split(_BLOCK):
            if not asks[:, rows].any():
                continue
            tables = tuple(table[:, rows] for table in rotary)
            queries = rotated(attention, hidden[:, rows], tables, "q").float().unflatten(1, (keys.shape[1], -1))
            logits = torch.einsum("bhgqd,bhnd->bhgqn", queries * attention.scaling, keys.float())
            seen = (columns <= rows[:, None]) & self.valid[:, None]
            weights = logits.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1).nan_to_num()
            received += (weights * asks[:, None, None, rows, None]).sum(dim=3).mean(dim=2)
        return received

    def _global_or_local(self, received: torch.Tensor, latest: torch.Tensor) -> torch.Tensor:
        """The scores of `ems`, (B, key heads, L): attention from all later queries, or from the latest if more."""
        columns = torch.arange(received.shape[2], device=received.device)
        readers = (self.last[:, None] + 1 - columns).clamp(min=1)
        average, image = received / readers[:, None], (self.image & self.valid)[:, None]
        totals = [(scores * image).sum(dim=2, keepdim=True) for scores in (average, latest)]
        return torch.maximum(average * totals[1] / totals[0].clamp(min=1e-12), latest)

    def _merge_into_covering(self, number: int) -> None:
        """Merges into the tokens that cover the others: a layer, and those before the one where these are chosen."""
        for earlier in range(0 if number == self.inside.covered_at else number, number + 1):
            keys = self.cache.layers[earlier].keys
            covering = torch.zeros(keys.shape[:3], device=keys.device)
            for row, places in enumerate(self.places):
                covering[row, :, places] = 1
            self._merge(earlier, covering)

    def _merge(self, number: int, scores: torch.Tensor) -> None:
        """Cuts a layer whose tokens that go are merged into those that stay."""
        layer, merge = self.cache.layers[number], MERGING[self.inside.method]
        chosen, merged = [], []
        for row, places in enumerate(map(_places, self.image & self.valid)):
            given = (part[row][:, places] for part in (layer.keys, layer.values, scores))
            merged.append(merge(*given, self.wanted[row], **self.inside.options))
            chosen.append([*places[merged[-1].kept]])
        self._hold(number, chosen, merged)

    def _hold(self, number: int, chosen: list[list[torch.Tensor]], merged: list[Merged] | None = None) -> None:
        """Cuts a layer: the text of each row and what each of its heads has chosen, `chosen[row][head]`."""
        layer = self.cache.layers[number]
        text = self.valid & ~self.image
        held = [len(_places(text[row])) + len(heads[0]) for row, heads in enumerate(chosen)]
        most, device = max(held), layer.keys.device
        columns = torch.zeros(*layer.keys.shape[:2], most, dtype=torch.long, device=device)
        for row, heads in enumerate(chosen):
            for head, places in enumerate(heads):
                columns[row, head, most - held[row] :] = torch.cat((_places(text[row]), places)).sort().values
        real = torch.arange(most, device=device) >= most - torch.tensor(held, device=device)[:, None]
        keys, values = (
            part.gather(2, columns[..., None].expand(-1, -1, -1, part.shape[-1])) for part in (layer.keys, layer.values)
        )
        bias = None
        if merged is not None:
            image = self.image[:, None].expand(-1, keys.shape[1], -1).gather(2, columns) & real[:, None]
            keys[image] = torch.cat([part.keys.flatten(0, 1) for part in merged])
            values[image] = torch.cat([part.values.flatten(0, 1) for part in merged])
            bias = torch.zeros(columns.shape, device=device)
            bias[image] = torch.cat([part.counts.flatten() for part in merged]).log()
            groups = self.inside.family.model.config.get_text_config().num_attention_heads // keys.shape[1]
            bias = bias.repeat_interleave(groups, dim=1)
        self.cache.layers[number] = ShortLayer(keys, values, real, self.image.shape[1], bias)

    def finish(self) -> None:
        if self.image is None:
            return
        if self.scores:
            self._cut_to_one_share()
        self.inside.record.info = PruneInfo(
            method=self.inside.method,
            keep=self.inside.keep,
            tokens_before=self.total,
            tokens_after=self.wanted,
            kept=[
                torch.isin(_places(image), places).nonzero().flatten().cpu()
                for image, places in zip(self.image, self.places)
            ],
        )

    def _cut_to_one_share(self) -> None:
        """`prefixkv`: the same share of each layer's attention, with as many tokens in all layers together."""
        chosen: dict[int, list[list[torch.Tensor]]] = {number: [] for number in self.scores}
        for row, places in enumerate(map(_places, self.image & self.valid)):
            masses = torch.stack([scores[row, places] for scores in self.scores.values()])
            order = masses.argsort(dim=1, descending=True, stable=True)
            numbers = equal_shares(masses.gather(1, order), self.wanted[row] * len(masses))
            for number, best, most in zip(self.scores, order, numbers):
                heads = self.cache.layers[number].keys.shape[1]
                chosen[number].append([places[best[:most]]] * heads)
        for number, rows in chosen.items():
            self._hold(number, rows)


def equal_shares(masses: torch.Tensor, total: int) -> list[int]:
    """How many of each layer's tokens to keep, `total` together, so that the smallest share of mass kept is largest.

    Args:
        masses: (layers, n), descending in each row.
        total: at least one for each layer, at most all.

    Returns:
        The number of tokens of each layer, from 1 up; 0 where there are none.
    """
    layers, tokens = masses.shape
    if not tokens:
        return [0] * layers
    kept = (masses / masses.sum(dim=1, keepdim=True).clamp(min=1e-12)).cumsum(dim=1).tolist()
    numbers = [1] * layers
    for _ in range(total - layers):
        free = [layer for layer in range(layers) if numbers[layer] < tokens]
        poorest = min(free, key=lambda layer: kept[layer][numbers[layer] - 1])
        numbers[poorest] += 1
    return numbers


def _places(row: torch.Tensor) -> torch.Tensor:
    return row.nonzero().flatten()


def _smooth(received: torch.Tensor) -> torch.Tensor:
    return F.avg_pool1d(received, _POOL, stride=1, padding=_POOL // 2)


def _heaviest(received: torch.Tensor, places: torch.Tensor, wanted: int) -> list[torch.Tensor]:
    order = received[:, places].argsort(dim=1, descending=True, stable=True)[:, :wanted]
    return [*places[order]]


def _heavy_and_recent(received: torch.Tensor, places: torch.Tensor, wanted: int) -> list[torch.Tensor]:
    recent = wanted // 2
    before, latest = places[: len(places) - recent], places[len(places) - recent :]
    return [torch.cat((heavy, latest)) for heavy in _heaviest(received, before, wanted - recent)]


def _crushed(received: torch.Tensor, places: torch.Tensor, wanted: int) -> list[torch.Tensor]:
    if not wanted:
        return [places] * len(received)
    scores = received[:, places]
    rank = scores.mean(dim=0).argsort(descending=True, stable=True)
    heavy = wanted - wanted // 4
    rest = rank[heavy:]
    upper = scores > scores.median(dim=1, keepdim=True).values
    majority = upper.float().mean(dim=1, keepdim=True) > 0.5
    far = (upper != majority).sum(dim=0)
    rest = rest[far[rest].argsort(stable=True)]
    spread = (2 * torch.arange(wanted // 4, device=rest.device) + 1) * len(rest) // max(2 * (wanted // 4), 1)
    return [places[torch.cat((rank[:heavy], rest[spread]))]] * len(received)
