"""Learning how many tokens go in each layer of a vision tower (DiffRate, arXiv:2305.17997; the steps themselves are
`studio.pruning.diffrate`).

For each layer and each way to go, pruning and merging, there is a distribution over the candidates "so many of all N
patches are gone by now". Its mean is the rate, which the hard number rounds; its tail is the probability that a token
of a rank goes, through which the loss reaches it (straight-through). While they learn, tokens are masked in attention,
not removed, which is the same for the others. The loss is that of the task and the squared distance of the tower's
share of operations from a target. Only the distributions are trained.

Deviations from the paper: numbers are absolute, so that they never fall from layer to layer; a token that merges counts
in its neighbour by its probability; and since patches are read behind the tower, one that goes reads as its neighbour
by its probability too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from studio.checkpoints.loading import load
from studio.checks import check_choice, check_number
from studio.data.scenes import draw_scene
from studio.errors import StudioError
from studio.evaluation.reading import IGNORED, PackedQuestions, pack_questions, packed_logits
from studio.pruning.attention import cls_probabilities
from studio.pruning.blocks import block
from studio.pruning.diffrate import RANKS, cosines, novelty, with_learned
from studio.pruning.quecc import FOLDER
from studio.training.export import save_bf16
from studio.training.recipe import Defaults, Recipe
from studio.training.tower import open_scenes, read_scenes, target_reader

TILES = (2, 2)
QUESTIONS = 12
_SPREAD = 0.1
"""Of all patches, how far the distributions reach at first."""


class Rates(nn.Module):
    """How many of N patches are gone in the middle of each of L layers, all but the last that are read.

    Args:
        gone: at first, of all patches, the shares that are gone there, (L,); half of them pruned.
        patches: N.
    """

    def __init__(self, gone: torch.Tensor, patches: int):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, len(gone), patches))
        self.start_at(torch.stack((gone / 2, gone)))

    @torch.no_grad()
    def start_at(self, shares: torch.Tensor) -> None:
        """Distributions around shares (2, L) of patches: those pruned, and all that are gone."""
        candidates = torch.arange(self.patches) / self.patches
        self.theta.copy_(-(candidates - shares[..., None]).abs() / _SPREAD)

    @property
    def patches(self) -> int:
        return self.theta.shape[2]

    def shares(self) -> torch.Tensor:
        """Means (2, L) of the distributions, in [0, 1)."""
        candidates = torch.arange(self.patches, device=self.theta.device) / self.patches
        return (self.theta.softmax(dim=-1) * candidates).sum(dim=-1)

    def goes(self) -> torch.Tensor:
        """The probability (2, L, N) that the token of each rank goes, the highest rank first."""
        after = self.theta.softmax(dim=-1).flip(-1).cumsum(dim=-1)  # of at least N - 1, N - 2, ..., 0 tokens
        return torch.cat((torch.zeros_like(after[..., :1]), after[..., :-1]), dim=-1)

    @torch.no_grad()
    def counts(self) -> tuple[list[int], list[int]]:
        """The numbers of merged and of pruned tokens in each layer."""
        merged, pruned, gone = [], [], 0
        for out, all_gone in (self.shares() * self.patches).round().long().T.tolist():
            pruned.append(max(out - gone, 0))
            gone += pruned[-1]
            merged.append(max(all_gone - gone, 0))
            gone += merged[-1]
        return merged, pruned

    def operations(self, width: int) -> torch.Tensor:
        """The share of a whole tower's operations, given its width C."""
        left = 1 + self.patches * (1 - self.shares().amax(dim=0).cummax(dim=0).values)
        return operations(torch.cat((left.new_full((1,), 1 + self.patches), left)), width)


def operations(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """The share of operations of layers that begin with n tokens (L,), CLS too; the first begins with all.

    Attention takes 4 n C^2 + 2 n^2 C of its n tokens, feed-forward 8 n C^2 of those that the next layer begins with.
    """
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    feed_forward = 8 * torch.cat((tokens[1:], tokens[-1:])) * width**2
    return (attention + feed_forward).sum() / ((attention[0] + 8 * tokens[0] * width**2) * len(tokens))


class MaskedTower:
    """The layers of a CLIP tower that a reader reads, with masks in place of removals.

    Args:
        tower: a CLIP vision model.
        layers: how many of its layers are read.
        rank: as of `studio.pruning.diffrate.DiffRate`.
    """

    def __init__(self, tower: Any, layers: int, rank: str):
        self.tower, self.layers, self.rank = tower, tower.encoder.layers[:layers], rank

    def __call__(self, pixel_values: torch.Tensor, rates: Rates) -> torch.Tensor:
        """The states (B, 1 + N, C) behind the last layer that CLS and each patch read."""
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        mask, sizes = torch.ones_like(x[..., 0]), torch.ones_like(x[..., 0])
        went = []
        for layer, step in zip(self.layers, (*self._steps(rates), None), strict=True):
            x, projections = _masked_attention(layer, x, sizes, mask)
            if step is not None:
                x, sizes, mask, stays, nearest = self._thin(x, sizes, mask, projections, *step)
                went.append((stays, nearest))
            x = x + layer.mlp(layer.layer_norm2(x))
        read = x[:, 1:]
        for stays, nearest in reversed(went):
            read = torch.lerp(_at(read, nearest), read, stays[..., None])
        return torch.cat((x[:, :1], read), dim=1)

    def _steps(self, rates: Rates) -> Iterator[tuple]:
        gone = 0
        for number, (merged, pruned) in enumerate(zip(*rates.counts(), strict=True)):
            yield gone + pruned, gone + pruned + merged, rates.goes()[:, number]
            gone += merged + pruned

    def _thin(self, x, sizes, mask, projections, out, all_gone, goes):
        """Tokens, sizes and masks (B, 1 + N) with more gone; whether each patch (B, N) stays, else its neighbour."""
        with torch.no_grad():
            ranks, alike = self._ranks(sizes, mask, *projections)
        out_at, gone_at = (ranks.shape[1] - number for number in (out, all_gone))
        not_pruned = _hard(ranks < out_at, 1 - goes[0][ranks])
        stays = _hard(ranks < gone_at, 1 - goes[1][ranks])
        there = (stays > 0)[:, None] & ~torch.eye(ranks.shape[1], dtype=torch.bool, device=x.device)
        nearest = alike.masked_fill(~there, -2).argmax(dim=2)
        counted = mask[:, 1:] * not_pruned * (1 - stays) * sizes[:, 1:]
        total = sizes.scatter_add(1, 1 + nearest, counted)
        into = (1 + nearest)[..., None].expand(-1, -1, x.shape[2])
        x = (x * sizes[..., None]).scatter_add(1, into, x[:, 1:] * counted[..., None]) / total[..., None]
        return x, total, mask * F.pad(stays, (1, 0), value=1.0), stays, nearest

    def _ranks(self, sizes, mask, attention, queries, keys):
        """The rank (B, N) of each patch, 0 the highest, those that are gone last; and how alike they are (B, N, N)."""
        there, alike = mask[:, 1:] > 0, cosines(keys[:, 1:], attention.num_heads)
        if self.rank == "likeness":
            scores = novelty(alike.masked_fill(~there[:, None], -2))
        else:
            scores = cls_probabilities(queries, keys, attention.num_heads, attention.scale, sizes * mask)
        scores = scores.masked_fill(~there, -torch.inf)
        return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1), alike


def _at(x, places):
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _hard(hard, soft):
    """A choice whose gradient is that of its probability."""
    return hard.float() + soft - soft.detach()


def _masked_attention(layer, x, sizes, mask):
    """Half a layer of CLIP, in which tokens attend to those with a mask of 1 and to themselves; what it attends by."""
    attention, h = layer.self_attn, layer.layer_norm1(x)
    projections = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in projections)
    logits = q @ k.transpose(-1, -2) * attention.scale + sizes.log()[:, None, None]
    itself = torch.eye(x.shape[1], device=x.device)
    seen = mask[:, None, None] * (1 - itself) + itself
    top = logits.masked_fill(seen == 0, -torch.inf).amax(dim=-1, keepdim=True).detach()
    weights = (logits - top).clamp(max=20).exp() * seen
    mixed = (weights / weights.sum(dim=-1, keepdim=True)) @ v
    return x + attention.out_proj(mixed.transpose(1, 2).flatten(-2)), (attention, *projections[:2])


class TrainableRates(nn.Module):
    """The rates of a reader's tower, and the reader, which stays as it is.

    Args:
        reader: a LLaVA-NeXT with a CLIP tower.
        target: the share of the operations of the layers that are read.
        weight: of the constraint.
        rank: as of `studio.pruning.diffrate.DiffRate`.

    Raises:
        StudioError: another model, too few layers, or a target that cannot be reached.
    """

    def __init__(self, reader: Any, target: float = 0.6, weight: float = 5.0, rank: str = RANKS[0]):
        super().__init__()
        check_choice("rank", rank, RANKS)
        config = reader.config
        vision, layer = config.vision_config, config.vision_feature_layer
        if (config.model_type, vision.model_type) != ("llava_next", "clip_vision_model") or not isinstance(layer, int):
            raise StudioError(
                f"Rates are learned for a LLaVA-NeXT with a CLIP tower, not for this {config.model_type}."
            )
        if (layers := layer % (vision.num_hidden_layers + 1)) < 2:
            raise StudioError("Rates are learned for all layers but the last, and this reader reads fewer than two.")
        check_number("flops", target, 1 / layers, 1, above=True)
        self.reader, self.target, self.weight, self.rank = reader.requires_grad_(False), target, weight, rank
        self.tower = MaskedTower(reader.model.vision_tower, layers, rank)
        gone = (1 - target) * layers / (layers - 1) * 2 / layers * torch.arange(1, layers)
        self.rates = Rates(gone.clamp(max=0.95), (vision.image_size // vision.patch_size) ** 2)

    def train(self, mode: bool = True) -> "TrainableRates":
        super().train(mode)
        self.reader.eval()
        return self

    def share(self) -> torch.Tensor:
        """The share of the operations of the layers that are read."""
        return self.rates.operations(self.reader.config.vision_config.hidden_size)

    def encode(self, original: Any, pixel_values: torch.Tensor, **given: Any) -> BaseModelOutputWithPooling:
        """What stands in for the forward pass of the tower."""
        states = self.tower(pixel_values, self.rates)
        several = (states,) * (1 + self.reader.config.vision_config.num_hidden_layers)
        return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=several)

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **packed: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the answers' tokens, and the constraint.

        Args:
            pixel_values, image_sizes: as of LLaVA-NeXT; all images have the same size.
            packed: the tensors of `PackedQuestions`.
        """
        with block(self.reader.model.vision_tower, {"forward": self.encode}):
            encoded = self.reader.model.get_image_features(
                pixel_values=pixel_values, image_sizes=image_sizes, return_dict=True
            )
        features = torch.stack(list(encoded.pooler_output))
        questions = PackedQuestions(**packed)
        places = 1 + torch.arange(features.shape[1], device=features.device)
        logits = packed_logits(self.reader, features, places, 1 + features.shape[1], questions)
        answers = F.cross_entropy(logits.float().flatten(0, 1), questions.targets.flatten(), ignore_index=IGNORED)
        return answers + self.weight * (self.share() - self.target).square()


class DiffRateRecipe(Recipe):
    """The numbers of tokens that go inside the vision tower of a LLaVA-NeXT that reads scenes."""

    kind = "diffrate"
    purpose = "Reads an image with fewer tokens inside its vision tower, as many as were learned (DiffRate)."
    origin = "rates that rise evenly from layer to layer"
    library, task = "transformers", "image-text-to-text"
    defaults = Defaults(steps=300, batch_size=2, learning_rate=0.05, warmup=0)
    takes = frozenset({"target"})
    model = {"flops": 0.545, "weight": 5.0, "rank": "likeness"}
    compiles = False

    def build(self) -> torch.nn.Module:
        self.pipe = target_reader(self)
        open_scenes(self)
        settings = {"target": self.model["flops"], "weight": self.model["weight"], "rank": self.model["rank"]}
        return TrainableRates(self.pipe.model, **settings).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(module.rates.parameters(), learning_rate)]

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        scenes = [draw_scene(rng, TILES, QUESTIONS) for _ in range(size)]
        pixels, texts = read_scenes(self.pipe.processor, scenes)
        return {**pixels, **pack_questions(self.pipe.processor.tokenizer, texts).tensors()}

    def load(self, module: Any, folder: Path) -> None:
        """Distributions around the numbers of an earlier run."""
        found = with_learned(load(folder).model, {})
        steps = torch.tensor([found["pruned"], found["merged"]])
        gone = steps.sum(dim=0).cumsum(dim=0)
        module.rates.start_at(torch.stack((gone - steps[1], gone)) / module.rates.patches)

    def export(self, module: Any, folder: Path) -> None:
        merged, pruned = module.rates.counts()
        config = module.reader.config
        learned = {"merged": merged, "pruned": pruned, "rank": module.rank}
        config.pruning = {**(getattr(config, "pruning", None) or {}), "diffrate": learned}
        save_bf16(module.reader, folder)
        self.pipe.processor.save_pretrained(folder)
        if self.pipe.compressor is not None:
            save_bf16(self.pipe.compressor, folder / FOLDER)

    def quality(self, folder: Path) -> dict:
        from studio.evaluation.scenes import evaluate_reader, evaluate_thinned

        pipe = load(folder, device=self.device)
        found = with_learned(pipe.model, {})
        gone = torch.tensor([found["merged"], found["pruned"]]).sum(dim=0).cumsum(dim=0)
        vision = pipe.model.config.vision_config
        tokens = 1 + (vision.image_size // vision.patch_size) ** 2 - F.pad(gone, (1, 0))
        whole = evaluate_reader(pipe.model, pipe.processor, methods=(), keeps=())
        return {
            "merged in the layers": ", ".join(map(str, found["merged"])),
            "pruned in the layers": ", ".join(map(str, found["pruned"])),
            "share of the operations": float(operations(tokens.double(), vision.hidden_size)),
            "accuracy": evaluate_thinned(pipe),
            "accuracy of the whole tower": whole["accuracy"]["none"]["1.0"],
            **{name: whole[name] for name in ("scenes", "questions")},
        }
