"""Recipe of `emoji-ar`."""

import copy
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from studio.data.archive import load_concepts
from studio.data.captions import open_choices
from studio.models.llamagen import LlamaGen
from studio.models.plan import plan_layers
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.training.caption_tokenizer import known_words
from studio.training.captioned_tokens import CAPTION_LENGTH, PLAN_SIZE, CaptionedTokens
from studio.training.emoji_words import EmojiWords, read_text_encoder
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe

TRANSFORMER = {"dim": 288, "num_layers": 6, "num_heads": 6, "ffn_dim": 768, "prefix_rope": "identity", "dropout": 0.0}
WORDS_SHARE = 1 / 3
"""Steps of `emoji-words` before, over steps of the token model."""
HIDING, MISLEADING = 0.25, 0.5
"""Shares of the pictures of which some earlier tokens are hidden, or are those of another picture: from none to all."""
SAMPLING = {"default_guidance_scale": 3.0, "default_temperature": 0.7}


class TrainableGenerator(nn.Module):
    """A frozen text encoder, and the token model that is trained on its states.

    While it is trained, a code's embedding and its row of the output layer are a vector of its own plus a linear map of
    its code vector. The maps are learned from all codes at once, so that a model that knows about what belongs into a
    cell gives weight to every code that looks like that; `merged` adds them to the tables.
    """

    def __init__(self, text_encoder, transformer, codebook):
        super().__init__()
        self.text_encoder, self.transformer = text_encoder.requires_grad_(False), transformer
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)
        dim, code_dim = transformer.config.dim, codebook.shape[1]
        self.code_embedding = nn.Parameter(torch.zeros(code_dim, dim))
        self.code_output = nn.Parameter(torch.zeros(code_dim, dim))

    def optimizers(self, learning_rate):
        """Muon for the hidden matrices of the token model, AdamW for everything else, the maps at the full rate."""
        model, maps = self.transformer, [self.code_embedding, self.code_output]
        matrices = hidden_matrices(model.layers, *plan_layers(model))
        return muon_and_adamw(self, matrices, learning_rate, tables=maps, tables_share=1.0)

    @torch.no_grad()
    def merged(self):
        """A copy of the token model that gives the same logits by its own tables."""
        transformer = copy.deepcopy(self.transformer)
        transformer.tok_embeddings.weight += self.codebook @ self.code_embedding
        transformer.output.weight += self.codebook @ self.code_output
        return transformer

    def forward(self, input_ids, attention_mask, tokens, fed, seen):
        """Mean cross-entropy of tokens (B, n) behind captions (B, T), some of which are dropped.

        The tokens `fed` (B, n - 1) are the earlier ones, but for some that mislead; only those in `seen` (B, n - 1)
        are visible. A model that can trust all earlier tokens reads the subject off them and hardly needs the words,
        and where it draws, one wrong token leads it to another subject.
        """
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        model = self.transformer
        drop = torch.rand(len(tokens), device=tokens.device) < model.config.class_dropout
        prefix, valid = model.embed_condition(captions=states, caption_mask=attention_mask, drop=drop)
        embedded = model.tok_embeddings(fed) + self.codebook[fed] @ self.code_embedding
        x = model.inputs(prefix, embedded * seen[..., None])
        x = model.run_layers(x, model.rope()[: x.shape[1]], model.prefix_mask(valid, x.shape[1]))
        output = model.output.weight + self.codebook @ self.code_output
        logits = F.linear(x[:, prefix.shape[1] - 1 :], output).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class EmojiAR(Recipe):
    """Draws an emoji from words: a small T5 encoder and a LlamaGen transformer over the tokens of `emoji-vq`.

    Without `--init-from` the text encoder is first made by `emoji-words`; from then on it stays as it is. A folder to
    start from may hold a text encoder alone, such as another run of that recipe.
    """

    name = "emoji-ar"
    data = "Fluent Emoji on ten backgrounds, without the held-out combinations; random captions, tokens of emoji-vq"
    defaults = Defaults(steps=3000, batch_size=64, learning_rate=4e-3, cooldown=0.4)

    def first(self, steps):
        return EmojiWords(), max(1, int(steps * WORDS_SHARE))

    def build(self, device):
        self.pictures = CaptionedTokens(device)
        text_encoder, codebook = self.pictures.new_text_encoder(), self.pictures.image_tokenizer.codebook
        transformer = LlamaGen(
            vocab_size=len(codebook),
            grid_size=self.pictures.grid_size,
            caption_dim=text_encoder.config.d_model,
            caption_length=CAPTION_LENGTH,
            plan_size=PLAN_SIZE,
            **TRANSFORMER,
        )
        return TrainableGenerator(text_encoder, transformer, codebook).to(device)

    def optimizers(self, module, learning_rate):
        return module.optimizers(learning_rate)

    def batch(self, rng, batch_size, device):
        batch = self.pictures.batch(rng, batch_size, device)
        return {**batch, **earlier_tokens(batch["tokens"], rng)}

    def load(self, module, folder):
        read_text_encoder(module.text_encoder, folder)
        if (folder / "transformer").is_dir():  # which may be from before there was a plan
            weights = LlamaGen.from_pretrained(folder / "transformer", dtype=torch.float32)
            module.transformer.load_state_dict(module.transformer.state_dict() | weights.state_dict())

    def export(self, module, folder):
        text_encoder, transformer = (
            part.to(torch.bfloat16).eval() for part in (copy.deepcopy(module.text_encoder), module.merged())
        )
        pipe = LlamaGenPipeline(
            self.pictures.image_tokenizer,
            transformer,
            text_encoder,
            self.pictures.tokenizer,
            lowercase_prompts=True,
            open_choices=open_choices(),
            **SAMPLING,
        )
        pipe.vocabulary = known_words(), [concept.label for concept in load_concepts()]
        pipe.save_pretrained(folder)
        shutil.rmtree(folder / "image_tokenizer")

    def quality(self, folder):
        from studio.checkpoints.loading import load
        from studio.evaluation.generators import evaluate_generator

        return evaluate_generator(load(folder))


def earlier_tokens(tokens, rng):
    """What is `fed` to a `TrainableGenerator` of tokens (B, n), and what of it is `seen`, both (B, n - 1)."""
    earlier = tokens[:, :-1]
    seen = ~torch.from_numpy(scattered(earlier.shape, HIDING, rng)).to(tokens.device)
    return {"fed": misled(earlier, rng), "seen": seen}


def misled(tokens, rng):
    """Tokens (B, n) or stacks of codes (B, n, D), in some pictures partly those of the picture before in the batch."""
    shape = tokens.shape[:2]
    foreign = scattered(shape, MISLEADING / 2, rng) | stretches(shape, MISLEADING / 2, rng)
    foreign = torch.from_numpy(foreign).to(tokens.device).view(*shape, *[1] * (tokens.ndim - 2))
    return torch.where(foreign, tokens.roll(1, dims=0), tokens)


def scattered(shape, share, rng):
    """Places (B, n) bool: in this share of the rows some, any part of them, wherever they are."""
    parts = rng.random((shape[0], 1)) * (rng.random((shape[0], 1)) < share)
    return rng.random(shape) < parts


def stretches(shape, share, rng):
    """Places (B, n) bool: in this share of the rows a stretch between any two."""
    ends = np.sort(rng.integers(0, shape[1] + 1, size=(shape[0], 2)), axis=1)
    ends[rng.random(shape[0]) >= share] = 0
    places = np.arange(shape[1])
    return (places >= ends[:, :1]) & (places < ends[:, 1:])
