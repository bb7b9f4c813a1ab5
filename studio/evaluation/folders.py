"""Evaluation of a generator on held-out images of a folder."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from studio.checkpoints.bundled import TRAINING_FILE, folder_of_model
from studio.data.image_folder import ImageFolder
from studio.data.source import Examples, Source, open_source
from studio.errors import StudioError
from studio.evaluation.metrics import frechet_distance, precision_recall
from studio.models.llamagen import LlamaGen
from studio.models.rq_transformer import RQTransformer
from studio.tokenizers.kl import KLTokenizer
from studio.tokenizers.token_bridge import TokenBridgeTokenizer
from studio.tokenizers.vq import VQTokenizer

FEWEST = 8


def unseen_source(model: str | Path, data: str | Path, size: int) -> Source:
    """A source of which a model has not seen the validation examples: of a folder that it was not trained on, these are
    all images.
    """
    source = open_source(data, size)
    try:
        trained_on = json.loads((folder_of_model(model) / TRAINING_FILE).read_text(encoding="utf-8"))["data_checksum"]
    except (OSError, ValueError, KeyError, TypeError):
        trained_on = None
    if isinstance(source, ImageFolder) and trained_on != source.checksum:
        source.hold_out_everything()
    return source


@torch.no_grad()
def evaluate_on_folder(
    pipe: Any,
    source: Source,
    *,
    samples: int = 200,
    seed: int = 0,
    features: str | None = None,
    decoding: object | None = None,
) -> dict:
    """Sample with the captions or classes of validation images, and compare with these images.

    Args:
        pipe: a pipeline that is conditioned as the source is; its own default guidance and sampling are used.
        source: the data.
        samples: how many images, at most as many as there are validation images.
        seed: of the first image; image i has `seed` + i.
        features: a vision model of transformers by name or folder, in whose pooled features distances are taken; the
            pipeline's image tokenizer, its encoder's features averaged over the image, when None.
        decoding: as in a call of the pipeline.

    Returns:
        `{"bits_per_token", "frechet", "precision", "recall", "features", "resolution", "samples"}`: the cross-entropy
        of validation tokens under their condition, in bits, of generators that have one (LlamaGen, RQ-Transformer);
        Frechet distance (None for fewer samples than features), precision and recall (arXiv:1904.06991).

    Raises:
        StudioError: other conditions than the pipeline's, or too few validation images.
    """
    examples, count = source.validation, min(samples, len(source.validation))
    if pipe.takes_text != source.has_captions:
        needed = "captions" if pipe.takes_text else "classes"
        raise StudioError(f"This pipeline is conditioned on {needed}, which {source.name} has not.")
    if count < FEWEST:
        raise StudioError(f"{source.name} has {count} images to compare with; at least {FEWEST} are needed.")
    name = features or "image tokenizer"
    extract = feature_extractor(features, pipe.device) if features else tokenizer_features(pipe.image_tokenizer)
    real, sampled = [], []
    for start in tqdm(range(0, count, 25), desc="sampling", unit="batch"):
        indices = range(start, min(start + 25, count))
        generators = [torch.Generator().manual_seed(seed + number) for number in indices]
        out = pipe(**_condition(pipe, examples, indices), generator=generators, decoding=decoding, output_type="pt")
        sampled.append(extract(out.images.float()))
        real.append(extract(examples.images(indices) / 2 + 0.5))
    true, made = torch.cat(real), torch.cat(sampled)
    precision, recall = precision_recall(made, true)
    bits = {"bits_per_token": bits_per_token(pipe, examples, count)}
    return {
        **({} if bits["bits_per_token"] is None else bits),
        "frechet": frechet_distance(made, true) if count > made.shape[1] else None,
        "precision": precision,
        "recall": recall,
        "features": name,
        "resolution": source.size,
        "samples": count,
    }


@torch.no_grad()
def bits_per_token(pipe: Any, examples: Examples, count: int) -> float | None:
    """Mean cross-entropy in bits of the tokens of the first examples under their condition; None for generators
    without a likelihood of tokens.
    """
    model, tokenizer, total, tokens_seen = pipe.transformer, pipe.image_tokenizer, 0.0, 0
    if not isinstance(model, LlamaGen | RQTransformer):
        return None
    for start in range(0, count, 25):
        indices = range(start, min(start + 25, count))
        tokens = tokenizer.encode(examples.images(indices).to(pipe.device, tokenizer.dtype))
        given = _condition(pipe, examples, indices)
        condition = pipe.condition(given.get("prompt"), given.get("class_labels"))
        if isinstance(model, LlamaGen):
            tokens = tokens.flatten(1)
            logits = model(tokens[:, :-1], **condition)
        else:
            prefix = condition.get("captions", condition.get("class_labels"))
            prefix = prefix if prefix.ndim > 1 else prefix[:, None]
            logits, _ = model(tokens, prefix, tokenizer.codebooks, valid=condition.get("caption_mask"))
        total += float(F.cross_entropy(logits.float().flatten(0, -2), tokens.flatten(), reduction="sum"))
        tokens_seen += tokens.numel()
    return total / tokens_seen / math.log(2)


def tokenizer_features(tokenizer: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images (n, 3, H, W) in [0, 1] to mean and standard deviation (n, 2 C) of their features before quantisation."""

    def extract(images):
        images = (images * 2 - 1).to(next(tokenizer.parameters()))
        if isinstance(tokenizer, KLTokenizer | TokenBridgeTokenizer):
            features = getattr(tokenizer, "continuous", tokenizer).encode_distribution(images).mean.flatten(2).mT
        elif isinstance(tokenizer, VQTokenizer):
            features = tokenizer.encode_features(images).flatten(2).mT
        else:
            features = tokenizer.encode_features(images).flatten(1, -2)
        features = features.float().cpu()
        return torch.cat((features.mean(dim=1), features.std(dim=1)), dim=1)

    return extract


def feature_extractor(name: str, device: str | torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images (n, 3, H, W) in [0, 1] to pooled features (n, D) of a vision model of transformers.

    Raises:
        StudioError: no such model.
    """
    from transformers import AutoImageProcessor, AutoModel

    try:
        model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise StudioError(f"{name} is no vision model of transformers that can be loaded here.") from error
    model = getattr(model, "vision_model", model).to(device).eval()

    @torch.no_grad()
    def extract(images):
        pixels = [(image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for image in images.cpu()]
        inputs = processor(pixels, return_tensors="pt")["pixel_values"].to(device)
        out = model(pixel_values=inputs)
        pooled = getattr(out, "pooler_output", None)
        return (out.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)).float().cpu()

    return extract


def _condition(pipe, examples, indices):
    if pipe.takes_text:
        return {"prompt": examples.captions(indices)}
    return {"class_labels": examples.labels(indices).tolist()}
