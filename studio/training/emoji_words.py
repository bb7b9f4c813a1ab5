"""Recipe of `emoji-words`: a text encoder learns to plan the pictures that captions name, before `emoji-ar` draws them.

A token model of small pictures reads most of its next token off the tokens before, so that little gradient reaches the
words. Guessing every code of the picture from the caption alone has no such short cut, and costs a hundredth of the
time. The guess of a region is linear in the state of one plan token, so that a token model finds what belongs into a
cell with one look at one state. (Tokens that only hold states are the registers of arXiv:2309.16588.)
"""

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5EncoderModel

from studio.data.captions import full_caption
from studio.evaluation.judge import draw_combinations
from studio.training.captioned_tokens import PLAN_SIZE, CaptionedTokens
from studio.training.export import save_bf16
from studio.training.muon import hidden_matrices, muon_and_adamw
from studio.training.recipe import Defaults, Recipe
from studio.training.token_cache import tokens_of

HEAD_FILE = "head.safetensors"
FITTED_CAPTIONS = 4096
MEASURED = 1000


class Guess(nn.Module):
    """Codes (B, grid_size ** 2, code_dim) of pictures, from the states of the last `plan_size ** 2` caption tokens.

    Args:
        text_encoder: every caption that it reads ends with the plan tokens, one a region in raster order.
        grid_size: side of the token grid; a multiple of `plan_size`.
        code_dim: numbers of a code vector.
    """

    def __init__(self, text_encoder, grid_size, plan_size, code_dim):
        super().__init__()
        self.text_encoder, self.plan_size, self.cells = text_encoder, plan_size, grid_size // plan_size
        self.head = nn.Linear(text_encoder.config.d_model, self.cells**2 * code_dim)

    def plan(self, input_ids, attention_mask):
        """States (B, plan_size ** 2, d_model) of the plan tokens of captions (B, T), padded on the right."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        number = self.plan_size**2
        places = attention_mask.sum(1, keepdim=True) - number + torch.arange(number, device=states.device)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def forward(self, input_ids, attention_mask):
        sizes = {"r": self.plan_size, "i": self.cells, "j": self.cells}
        return rearrange(self.head(self.plan(input_ids, attention_mask)), "b (r c) (i j d) -> b (r i c j) d", **sizes)

    @torch.no_grad()
    def fit(self, input_ids, attention_mask, codes):
        """The head that guesses codes (B, n, code_dim) best by least squares, for a text encoder that came without."""
        plan = self.plan(input_ids, attention_mask).flatten(0, 1).double()
        sizes = {"r": self.plan_size, "c": self.plan_size}
        wanted = rearrange(codes, "b (r i c j) d -> (b r c) (i j d)", i=self.cells, j=self.cells, **sizes).double()
        plan = torch.cat((plan, plan.new_ones(len(plan), 1)), dim=1)
        ridge = 1e-6 * len(plan) * torch.eye(plan.shape[1], dtype=plan.dtype, device=plan.device)
        solution = torch.linalg.solve(plan.T @ plan + ridge, plan.T @ wanted)
        self.head.weight.copy_(solution[:-1].T)
        self.head.bias.copy_(solution[-1])


class EmojiWords(Recipe):
    """Plans emoji from words: the text encoder of emoji-ar, taught to guess a picture's codes from its caption."""

    name = "emoji-words"
    data = "Fluent Emoji on ten backgrounds, without the held-out combinations; random captions, tokens of emoji-vq"
    defaults = Defaults(steps=1000, batch_size=256, learning_rate=8e-3, warmup=50, cooldown=0.4)

    def build(self, device):
        self.pictures = CaptionedTokens(device)
        self.codebook = self.pictures.image_tokenizer.codebook.detach()
        return self.guess(self.pictures.new_text_encoder()).to(device)

    def guess(self, text_encoder):
        return Guess(text_encoder, self.pictures.grid_size, PLAN_SIZE, self.codebook.shape[1])

    def optimizers(self, module, learning_rate):
        matrices = hidden_matrices(module.text_encoder.encoder)
        return muon_and_adamw(module, matrices, learning_rate, tables=[module.text_encoder.shared.weight])

    def batch(self, rng, batch_size, device):
        return self.pictures.batch(rng, batch_size, device)

    def loss(self, module, batch):
        """Mean squared distance of a guessed code from the true one."""
        guessed = module(batch["input_ids"], batch["attention_mask"])
        return (guessed - self.codebook[batch["tokens"]]).square().sum(-1).mean()

    def load(self, module, folder):
        read_text_encoder(module.text_encoder, folder)
        if (folder / HEAD_FILE).is_file():
            module.head.load_state_dict(load_file(folder / HEAD_FILE))
        else:
            batch = self.batch(np.random.default_rng(0), FITTED_CAPTIONS, self.codebook.device)
            module.fit(batch["input_ids"], batch["attention_mask"], self.codebook[batch["tokens"]])

    def export(self, module, folder):
        save_bf16(module.text_encoder, folder / "text_encoder")
        self.pictures.tokenizer.save_pretrained(folder / "tokenizer")
        save_file({name: part.contiguous() for name, part in module.head.state_dict().items()}, folder / HEAD_FILE)

    @torch.no_grad()
    def quality(self, folder):
        """Of pictures that were held out: the distance from the true codes, and the share of their variance guessed."""
        device = self.codebook.device
        module = self.guess(self.pictures.new_text_encoder()).to(device).eval()
        self.load(module, folder)
        rows = draw_combinations(MEASURED, np.random.default_rng(0))
        text = self.pictures.encode([full_caption(*row) for row in rows.tolist()])
        text = {name: part.to(device) for name, part in text.items()}
        codes = self.codebook[torch.from_numpy(tokens_of(self.pictures.image_tokenizer, rows)).to(device)]
        distance = (module(**text) - codes).square().sum(-1).mean()
        variance = (codes - codes.mean((0, 1))).square().sum(-1).mean()
        return {"distance": float(distance), "explained": float(1 - distance / variance), "samples": len(rows)}


def read_text_encoder(text_encoder, folder):
    """Weights of a pipeline's or a run's text encoder; layers that it lacks stay as they are."""
    weights = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).state_dict()
    text_encoder.load_state_dict(text_encoder.state_dict() | weights)
