"""Every kind at a tiny size, with the runs that others build on."""

import torch
from transformers import CLIPVisionModel, T5EncoderModel

from studio.checkpoints.loading import load
from studio.evaluation.judge import Judge, load_judge
from studio.pipelines.llamagen import LlamaGenPipeline
from studio.pipelines.mar import MARPipeline
from studio.pipelines.resgen import ResGenPipeline
from studio.pipelines.rq_transformer import RQTransformerPipeline
from studio.pipelines.token_bridge import TokenBridgePipeline
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.pipelines.xar import XARPipeline
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.rvq import RVQTokenizer
from studio.tokenizers.vq import VQTokenizer
from studio.training import (
    rvq,
    train,
    vq,
)

TINY = {
    "vq": {"size": 16, "grid": 4, "dim": 32, "codes": 64, "layers": 1},
    "rvq": {"size": 16, "grid": 4, "dim": 32, "codes": 64, "layers": 1, "model": {"z_channels": 32, "feature_dim": 4}},
    "kl": {"size": 16, "grid": 4, "dim": 32, "layers": 1},
    "one-d-piece": {"size": 16, "tokens": 8, "codes": 64, "dim": 64, "layers": 1, "model": {"patch_size": 4}},
    "text-encoder": {"dim": 32, "layers": 1},
    "llamagen": {"dim": 32, "layers": 1},
    "mar": {"dim": 32, "layers": 2, "model": {"head_width": 32, "head_depth": 1}},
    "token-bridge": {"dim": 32, "layers": 2, "model": {"head_width": 32, "head_depth": 1, "head_heads": 2}},
    "xar": {"dim": 32, "layers": 2},
    "resgen": {"dim": 32, "layers": 1, "model": {"components": 8, "rank": 2}},
    "rq-transformer": {"dim": 32, "layers": 1, "model": {"depth_layers": 1}},
    "drafter": {},
    "mar-drafter": {"dim": 32, "model": {"head_width": 32, "head_depth": 1}},
    "student": {"model": {"pairs": 6}},
    "reader": {},
    "tower": {},
    "quecc": {},
    "diffrate": {"model": {"flops": 0.75}},
    "judge": {"size": 32, "dim": 8},
}
RECIPES = {"vq": vq.VQRecipe, "rvq": rvq.RVQRecipe}
LOADED = {
    "vq": VQTokenizer,
    "rvq": RVQTokenizer,
    "kl": KLTokenizer,
    "one-d-piece": OneDPieceTokenizer,
    "text-encoder": T5EncoderModel,
    "llamagen": LlamaGenPipeline,
    "mar": MARPipeline,
    "token-bridge": TokenBridgePipeline,
    "xar": XARPipeline,
    "resgen": ResGenPipeline,
    "rq-transformer": RQTransformerPipeline,
    "drafter": LlamaGenPipeline,
    "mar-drafter": MARPipeline,
    "student": LlamaGenPipeline,
    "reader": VisualQuestionPipeline,
    "tower": CLIPVisionModel,
    "quecc": VisualQuestionPipeline,
    "diffrate": VisualQuestionPipeline,
    "judge": Judge,
}
NEEDS = {"drafter": "llamagen", "mar-drafter": "mar", "student": "llamagen", "quecc": "reader", "diffrate": "reader"}
TOKENIZER = {"mar": "kl", "token-bridge": "kl", "xar": "kl", "resgen": "rvq", "rq-transformer": "rvq"}
GENERATORS = ("llamagen", "mar", "token-bridge", "xar", "resgen", "rq-transformer")
BUILT = {}
"""Runs on the emoji set that others build on, by kind: each is trained once."""


def run(kind, out, *, data="emoji", steps=2, **options):
    """Train a kind at a tiny size after what it builds on; its result."""
    builds_on = {}
    if kind in GENERATORS + ("text-encoder",) and "tokenizer" not in options:
        builds_on["tokenizer"] = TOKENIZER.get(kind, "vq")
    if kind in NEEDS and "target" not in options:
        builds_on["target"] = NEEDS[kind]
    for name in builds_on.values():
        build(name, out.parent / name)
    given = {**TINY[kind], **builds_on, **options}
    return train(kind=kind, data=str(data), out=out, steps=steps, batch_size=4, **given)


def build(kind, folder):
    """The run of a kind, of one step, beside the others; it may be that of an earlier test."""
    if folder.exists():
        return
    if kind in BUILT:
        folder.symlink_to(BUILT[kind])
    else:
        run(kind, folder, steps=1)
        BUILT[kind] = folder


def read(kind, folder):
    if kind == "tower":
        return CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    if kind == "text-encoder":
        return T5EncoderModel.from_pretrained(f"{folder}/text_encoder", dtype=torch.float32)
    return load_judge(folder, "cpu") if kind == "judge" else load(folder, device="cpu")


def network(model):
    """The part that was trained."""
    parts = (getattr(model, name, None) for name in ("student", "drafter", "compressor", "transformer", "model"))
    return next((part for part in parts if part is not None), model)
