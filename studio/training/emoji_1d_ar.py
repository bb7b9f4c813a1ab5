"""Recipe of `emoji-1d-ar`: a LlamaGen over the rows of tokens of `emoji-1d`, coarse to fine, for captions.

It learns as `emoji-ar` does, with positions in one dimension. Each token starts with reading the plan of the regions
that it stood for when the training of `emoji-1d` began.
"""

import torch
from einops import reduce

from studio.checkpoints.loading import load
from studio.models.llamagen import LlamaGen
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.training.emoji_ar import SAMPLING, TrainableGenerator, earlier_tokens
from studio.training.from_words import FromWords, Listening
from studio.training.ingredients import ingredient
from studio.training.pyramid_start import pyramid
from studio.training.recipe import Defaults
from studio.training.token_cache import training_tokens

IMAGE_TOKENIZER = "emoji-1d"
TRANSFORMER = {"dim": 96, "num_layers": 3, "num_heads": 4, "ffn_dim": 288, "prefix_rope": "identity", "dropout": 0.0}
ELSEWHERE = 0.01
"""Share of a region that a token does not stand for, beside those that it does."""


class Emoji1DAR(FromWords):
    """Draws an emoji from words, coarse to fine, in as many tokens as you like: a LlamaGen over those of `emoji-1d`."""

    name = "emoji-1d-ar"
    data = "Fluent Emoji on ten backgrounds, without the held-out combinations; random captions, tokens of emoji-1d"
    defaults = Defaults(steps=1000, batch_size=64, learning_rate=4e-3, cooldown=0.4)
    pipeline, drawing = LlamaGenPipeline, SAMPLING

    def build(self, device):
        self.listen(device)
        self.image_tokenizer = load(ingredient(IMAGE_TOKENIZER), device=device, dtype=torch.float32)
        self.drawn, self.tokens = training_tokens(self.image_tokenizer)
        codebook = self.image_tokenizer.codebook
        transformer = LlamaGen(
            vocab_size=len(codebook),
            grid_size=None,
            row_length=self.image_tokenizer.row_length,
            **self.planned_shape(),
            **TRANSFORMER,
        )
        if transformer.config.plan_size:
            read_what_tokens_stood_for(transformer, self.image_tokenizer.encoder.side)
        return TrainableGenerator(self.text.text_encoder, transformer, codebook).to(device)

    def optimizers(self, module, learning_rate):
        return module.optimizers(learning_rate)

    def batch(self, rng, batch_size, device):
        chosen = torch.from_numpy(rng.integers(len(self.drawn), size=batch_size))
        tokens, captions = self.tokens[chosen].to(device), self.captions(self.drawn[chosen], rng, device)
        return {**captions, "tokens": tokens, **earlier_tokens(tokens, rng)}

    def export(self, module, folder):
        self.save_pipeline(folder, self.image_tokenizer, Listening(module.merged(), module.text_encoder))


@torch.no_grad()
def read_what_tokens_stood_for(transformer, side):
    """Lets each token read the regions of the cells, in a grid of `side` a side, that it stood for in the beginning."""
    shares, regions = transformer.plan_embeddings.shares, transformer.config.plan_size
    sizes = {"r": regions, "c": regions, "i": side // regions}
    stood_for = reduce(pyramid(side, len(shares)), "n (r i c j) -> n (r c)", "sum", **sizes)
    shares.copy_((stood_for + ELSEWHERE).log())
