"""Recipe of `emoji-resgen`: ResGen (arXiv:2412.10208) over the codes of `emoji-rvq`, for captions.

The spread of the mixture is that of what the quantiser leaves over, as in CLaM-TTS (arXiv:2404.02781). Ours: the free
parts of the means start at sums of levels of training pictures, so that every component begins where the data lie; Muon
for the hidden matrices; no average of the weights is kept, since the learning rate falls to zero.
"""

import numpy as np
import torch

from studio.data.archive import load_pictures
from studio.data.backgrounds import render
from studio.decoding.residual_masks import hidden_slots, hide, shown
from studio.models.plan import plan_layers
from studio.models.resgen import ResGen
from studio.pipelines.resgen import ResGenPipeline
from studio.training.from_codes import FromCodes, ListeningToCodes
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults

SIZES = {"dim": 128, "num_layers": 4, "num_heads": 4}
MIXTURE = {"components": 128, "rank": 16}
MEASURED = 512
"""Pictures whose residuals say how wide a component is."""
DRAWING = {"default_guidance_scale": 1.0, "default_num_steps": 16}
"""Of some guidances, none came nearest to the pictures of 64 training captions."""


class TrainableResGen(ListeningToCodes):
    """A ResGen in training."""

    def forward(self, codes, hidden, input_ids, attention_mask):
        """Mean cost of the hidden levels, of which each cell has `hidden` (B, L), of codes (B, L, D)."""
        condition = self.condition(input_ids, attention_mask)
        return self.transformer.loss(self.quantizer.lookup(codes), codes, hidden, **condition)


class EmojiResGen(FromCodes):
    """Draws an emoji from words, all levels of many cells at a time: a ResGen over the codes of `emoji-rvq`."""

    name = "emoji-resgen"
    defaults = Defaults(steps=3000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline, drawing = ResGenPipeline, DRAWING

    def trainable(self, device):
        transformer, quantizer = self.network(device), self.image_tokenizer.quantizer
        return TrainableResGen(transformer, self.text.text_encoder, quantizer)

    def network(self, device) -> ResGen:
        """A network of random weights, of which the means start at the data."""
        transformer = ResGen(sigma=self.left_over(), **MIXTURE, **self.shape()).to(device)
        start_means(transformer.head, self.codes.to(device), self.image_tokenizer.quantizer)
        return transformer

    def shape(self) -> dict:
        """The configuration of a network without that of its head."""
        return {"num_positions": self.codes.shape[1], **self.code_shape(), **self.planned_shape(), **SIZES}

    @torch.no_grad()
    def left_over(self) -> float:
        """The standard deviation of what all levels leave over, over training pictures."""
        tokenizer = self.image_tokenizer
        rows = self.drawn[:: max(1, len(self.drawn) // MEASURED)].numpy()
        images = render(load_pictures(tokenizer.config.sample_size), rows) * 2 - 1
        vectors = torch.cat([tokenizer.encode_features(part.to(tokenizer.device)) for part in images.split(64)])
        quantizer = tokenizer.quantizer
        return float((vectors - quantizer.lookup(quantizer.encode(vectors)).sum(dim=-2)).std())

    def optimizers(self, module, learning_rate):
        model = module.transformer
        matrices, tables = hidden_matrices(model.blocks, *plan_layers(model)), self.tables(model)
        return muon_and_adamw(module, matrices, learning_rate, tables=tables, tables_share=1.0)

    def tables(self, model: ResGen) -> list[torch.nn.Parameter]:
        """What moves at the full learning rate beside the hidden matrices."""
        return [model.positions, model.hidden_levels.weight, model.head.offsets]

    def batch(self, rng, batch_size, device):
        """Codes, captions, and how many levels of each cell are hidden, after a random time of the noising process."""
        chosen = torch.from_numpy(rng.integers(len(self.drawn), size=batch_size))
        codes = self.codes[chosen]
        slots = codes[0].numel()
        count = hidden_slots(torch.from_numpy(rng.random(batch_size)), slots).clamp(min=1)
        hidden = hide(torch.from_numpy(rng.random(codes.shape)), count)
        return {
            "codes": codes.to(device),
            "hidden": hidden.to(device),
            **self.captions(self.drawn[chosen], rng, device),
        }


@torch.no_grad()
def start_means(head, codes, quantizer):
    """Put the free part of every mean of a mixture at the sum of the deepest levels, any number of them, of some cell
    of codes (n, L, D)."""
    rng, cells = np.random.default_rng(0), codes.flatten(0, 1)
    chosen = torch.from_numpy(rng.integers(len(cells), size=head.components))
    depth = cells.shape[1]
    hidden = torch.from_numpy(rng.integers(1, depth + 1, size=head.components)).to(cells.device)
    vectors = quantizer.lookup(cells[chosen.to(cells.device)])
    head.offsets.copy_((vectors * ~shown(hidden, depth)[..., None]).sum(dim=-2))
