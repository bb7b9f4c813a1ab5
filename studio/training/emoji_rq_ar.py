"""Recipe of `emoji-rq-ar`: RQ-Transformer (arXiv:2203.01941) over the codes of `emoji-rvq`, for captions; the classical
way to draw what `emoji-resgen` draws.

Deviations from the authors' recipe: the codes themselves are learned, not soft ones along codes drawn at random; a
classifier for each level, since each has a codebook of its own; some of the earlier cells mislead, as in `emoji_ar`;
Muon for the hidden matrices; no average of the weights is kept, since the learning rate falls to zero.
"""

import torch
import torch.nn.functional as F

from studio.models.rq_transformer import RQTransformer
from studio.pipelines.rq_transformer import RQTransformerPipeline
from studio.training.emoji_ar import SAMPLING, misled
from studio.training.from_codes import FromCodes, ListeningToCodes
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults

SIZES = {
    "dim": 256,
    "spatial_layers": 7,
    "depth_layers": 2,
    "spatial_heads": 8,
    "depth_heads": 8,
    "shared_classifier": False,
    "dropout": 0.0,
}
"""More parameters than `emoji-resgen` has, which reads a plan of the picture; this one does not."""


class TrainableRQ(ListeningToCodes):
    """An RQTransformer in training."""

    def forward(self, codes, fed, input_ids, attention_mask):
        """Mean cross-entropy of codes (B, L, D) behind captions (B, T), some of which are dropped.

        The earlier cells that the spatial transformer reads are those of `fed` (B, L, D); see `misled`.
        """
        model, said, tables = self.transformer, self.condition(input_ids, attention_mask), self.quantizer.tables
        contexts, _ = model.contexts(fed, said["captions"], tables, valid=said["caption_mask"])
        return F.cross_entropy(model.logits(contexts, codes, tables).flatten(0, 2), codes.flatten())


class EmojiRQAR(FromCodes):
    """Draws an emoji from words, cell by cell and level by level: an RQ-Transformer over the codes of `emoji-rvq`."""

    name = "emoji-rq-ar"
    defaults = Defaults(steps=3000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline, drawing = RQTransformerPipeline, SAMPLING

    def trainable(self, device):
        tokenizer = self.image_tokenizer
        grid = tuple(tokenizer.config.sample_size // pixels for pixels in tokenizer.pixels_per_cell)
        transformer = RQTransformer(grid=grid, **self.code_shape(), **self.caption_shape(), **SIZES)
        return TrainableRQ(transformer, self.text.text_encoder, tokenizer.quantizer)

    def optimizers(self, module, learning_rate):
        model = module.transformer
        matrices = hidden_matrices(model.body_transformer, model.head_transformer)
        places = [model.pos_emb_cond, model.pos_emb_hw, model.pos_emb_d]
        return muon_and_adamw(module, matrices, learning_rate, tables=places, tables_share=1.0)

    def batch(self, rng, batch_size, device):
        chosen = torch.from_numpy(rng.integers(len(self.drawn), size=batch_size))
        codes, captions = self.codes[chosen].to(device), self.captions(self.drawn[chosen], rng, device)
        return {"codes": codes, "fed": misled(codes, rng), **captions}
