"""Recipe of `emoji-ar`."""

import copy
import json
import shutil

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Config, T5EncoderModel

from studio.checkpoints.bundled import bundled_folder
from studio.checkpoints.vocabulary import CONCEPTS_FILE
from studio.data.archive import load_concepts
from studio.data.captions import random_caption
from studio.models.llamagen import LlamaGen
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.tokenizers.vq import VQTokenizer
from studio.training.caption_tokenizer import known_words, train_caption_tokenizer
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe
from studio.training.token_cache import training_tokens
from studio.training.words import teach_words

PLAN_SIZE = 4
CAPTION_LENGTH = 16 + PLAN_SIZE**2
TEXT = {"d_model": 256, "d_kv": 32, "d_ff": 768, "num_layers": 2, "num_heads": 8}
TRANSFORMER = {"dim": 288, "num_layers": 6, "num_heads": 6, "ffn_dim": 768, "prefix_rope": "identity", "dropout": 0.0}
WORDS_SHARE = 1 / 3
"""Steps of the text encoder before, over steps of the token model."""
HIDING = 0.25
"""Share of the pictures of which some earlier tokens are hidden, from none to all of them."""
SAMPLING = {"default_guidance_scale": 3.0}


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

    @torch.no_grad()
    def merged(self):
        """A copy of the token model that gives the same logits by its own tables."""
        transformer = copy.deepcopy(self.transformer)
        transformer.tok_embeddings.weight += self.codebook @ self.code_embedding
        transformer.output.weight += self.codebook @ self.code_output
        return transformer

    def forward(self, input_ids, attention_mask, tokens, seen):
        """Mean cross-entropy of tokens (B, n) behind captions (B, T), some of which are dropped.

        Of the tokens that are fed only those in `seen` (B, n - 1) are visible. A model that sees all earlier tokens
        can read the subject off them and hardly needs the words; one that does not has to learn what the words mean.
        """
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        model = self.transformer
        drop = torch.rand(len(tokens), device=tokens.device) < model.config.class_dropout
        prefix, valid = model.embed_condition(captions=states, caption_mask=attention_mask, drop=drop)
        embedded = model.tok_embeddings(tokens[:, :-1]) + self.codebook[tokens[:, :-1]] @ self.code_embedding
        x = torch.cat((prefix, embedded * seen[..., None]), dim=1)
        x = model.run_layers(x, model.rope()[: x.shape[1]], model.prefix_mask(valid, x.shape[1]))
        output = model.output.weight + self.codebook @ self.code_output
        logits = F.linear(x[:, prefix.shape[1] - 1 :], output).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class EmojiAR(Recipe):
    """Draws an emoji from words: a small T5 encoder and a LlamaGen transformer over the tokens of `emoji-vq`.

    Without `--init-from` the encoder learns first to plan pictures from their captions; then it stays as it is.
    """

    name = "emoji-ar"
    data = "Fluent Emoji on ten backgrounds, without the held-out combinations; random captions, tokens of emoji-vq"
    defaults = Defaults(steps=3000, batch_size=64, learning_rate=4e-3, cooldown=0.4)

    def build(self, device):
        folder = bundled_folder("emoji-vq")
        self.image_tokenizer = VQTokenizer.from_pretrained(folder).to(device).eval()
        self.drawn, self.tokens = training_tokens(self.image_tokenizer, folder / "diffusion_pytorch_model.safetensors")
        self.tokenizer = train_caption_tokenizer(CAPTION_LENGTH, PLAN_SIZE**2)
        text = T5Config(
            vocab_size=len(self.tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0,
            eos_token_id=1, **TEXT,
        )  # fmt: skip
        transformer = LlamaGen(
            vocab_size=self.image_tokenizer.config.codebook_size,
            grid_size=int(self.tokens.shape[1] ** 0.5),
            caption_dim=text.d_model,
            caption_length=CAPTION_LENGTH,
            **TRANSFORMER,
        )
        return TrainableGenerator(T5EncoderModel(text), transformer, self.image_tokenizer.codebook).to(device)

    def prepare(self, module, settings):
        text_encoder, steps = module.text_encoder.requires_grad_(True), int(settings.steps * WORDS_SHARE)
        teach_words(text_encoder, self.image_tokenizer.codebook, self.captioned, PLAN_SIZE, steps, settings.seed)
        text_encoder.requires_grad_(False)

    def optimizers(self, module, learning_rate):
        maps = [module.code_embedding, module.code_output]
        matrices = hidden_matrices(module.transformer.layers)
        return muon_and_adamw(module, matrices, learning_rate, tables=maps, tables_share=1.0)

    def captioned(self, rng, number):
        """`(input_ids, attention_mask, tokens)` of training pictures with random captions."""
        chosen = torch.from_numpy(rng.integers(len(self.drawn), size=number))
        captions = [random_caption(*row, rng) for row in self.drawn[chosen].tolist()]
        text = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=CAPTION_LENGTH, return_tensors="pt"
        )
        return text["input_ids"], text["attention_mask"], self.tokens[chosen]

    def batch(self, rng, batch_size, device):
        input_ids, attention_mask, tokens = self.captioned(rng, batch_size)
        hidden = rng.random((batch_size, 1)) * (rng.random((batch_size, 1)) < HIDING)
        seen = rng.random((batch_size, self.tokens.shape[1] - 1)) >= hidden
        return {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
            "tokens": tokens.to(device),
            "seen": torch.from_numpy(seen).to(device),
        }

    def load(self, module, folder):
        for part, name in ((module.text_encoder, "text_encoder"), (module.transformer, "transformer")):
            weights = type(part).from_pretrained(folder / name, dtype=torch.float32)
            part.load_state_dict(weights.state_dict())

    def export(self, module, folder):
        text_encoder, transformer = (
            part.to(torch.bfloat16).eval() for part in (copy.deepcopy(module.text_encoder), module.merged())
        )
        pipe = LlamaGenPipeline(
            self.image_tokenizer, transformer, text_encoder, self.tokenizer, lowercase_prompts=True, **SAMPLING
        )
        pipe.save_pretrained(folder)
        shutil.rmtree(folder / "image_tokenizer")
        labels = [concept.label for concept in load_concepts()]
        content = json.dumps({"words": known_words(), "concepts": labels}, ensure_ascii=False, indent=0)
        (folder / CONCEPTS_FILE).write_text(content + "\n", encoding="utf-8")

    def quality(self, folder):
        from studio.checkpoints.loading import load
        from studio.evaluation.generators import evaluate_generator

        return evaluate_generator(load(folder))
