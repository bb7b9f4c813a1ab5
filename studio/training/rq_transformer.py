"""RQ-Transformer (arXiv:2203.01941) over the residual codes of an RVQ tokenizer, cell by cell and level by level.

Deviations from the authors' recipe: the codes themselves are learned, not soft ones along codes sampled at random; a
classifier for each level, since each has a codebook of its own; some of the earlier cells mislead, as in `llamagen`;
Muon for the hidden matrices.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from studio.models.rq_transformer import RQTransformer
from studio.pipelines.rq_transformer import RQTransformerPipeline
from studio.training.llamagen import misled
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults
from studio.training.resgen import CodesRecipe, ConditionedOnCodes


class TrainableRQ(ConditionedOnCodes):
    """An RQTransformer with its loss."""

    def forward(self, codes: torch.Tensor, fed: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of codes (B, L, D) under a condition.

        The earlier cells that the spatial transformer reads are those of `fed` (B, L, D); see `misled`.
        """
        model, tables, condition = self.transformer, self.quantizer.tables, self.condition(**given)
        if "captions" in condition:
            prefix = {"condition": condition["captions"], "valid": condition["caption_mask"]}
        else:
            prefix = {"condition": condition["class_labels"][:, None]}
        contexts, _ = model.contexts(fed, codebooks=tables, **prefix)
        return F.cross_entropy(model.logits(contexts, codes, tables).flatten(0, 2), codes.flatten())


class RQTransformerRecipe(CodesRecipe):
    """An RQ-Transformer from scratch."""

    kind = "rq-transformer"
    purpose = "Samples an image cell by cell and level by level, under a caption or a class."
    defaults = Defaults(steps=4000, batch_size=64, learning_rate=3e-3, cooldown=0.4)
    pipeline = RQTransformerPipeline
    uses_plan = False
    model = {"num_heads": None, "depth_layers": 2}
    sampling = {
        "default_guidance_scale": 3.0, "default_temperature": 0.7, "default_top_k": 0, "default_top_p": 1.0,
    }  # fmt: skip

    def build(self) -> torch.nn.Module:
        self.prepare()
        tokenizer, dim = self.image_tokenizer, self.options.dim or 256
        if self.text is None:
            self.sampling["default_guidance_scale"] = 1.0  # a class-conditional RQ-Transformer has no null class
        heads = self.model["num_heads"] or max(1, dim // 32)
        transformer = RQTransformer(
            grid=tuple(tokenizer.config.sample_size // pixels for pixels in tokenizer.pixels_per_cell),
            dim=dim,
            spatial_layers=self.options.layers or 7,
            depth_layers=self.model["depth_layers"],
            spatial_heads=heads,
            depth_heads=heads,
            shared_classifier=False,
            dropout=0.0,
            **self.code_shape(),
            **self.condition_shape(),
        )
        return TrainableRQ(transformer, self.text, tokenizer.quantizer).to(self.device)

    def optimizers(self, module: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
        model = module.transformer
        matrices = [*hidden_matrices(model.body_transformer, model.head_transformer), *self.text_matrices(module)]
        places = [model.pos_emb_cond, model.pos_emb_hw, model.pos_emb_d]
        return muon_and_adamw(module, matrices, learning_rate, tables=places, tables_share=1.0)

    def batch(self, rng: np.random.Generator, size: int, training: bool = True) -> dict[str, torch.Tensor]:
        indices, condition = self.chosen(rng, size, training)
        codes = (self.codes if training else self.unseen)[torch.from_numpy(indices)]
        return {"codes": codes, "fed": misled(codes, rng) if training else codes, **condition}
