"""Evaluation of a vision-language model on scenes, with all and with pruned tokens, every method at equal counts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from studio.checks import check_integer
from studio.data.scenes import draw_scene, draw_single
from studio.evaluation.reading import compressed_logits, exact_answers, pack_questions, packed_logits
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.pruning.api import merge_tokens, prune, prune_inputs
from studio.pruning.registry import METHODS, READS_TEXT

MAX_SCENES = 100_000
KEEPS = (0.5, 0.2, 0.1, 0.05)
_STREAM = 1_000_000_007
"""First number of the seeds of evaluation; training's seeds are small, so no scene is seen twice."""


@torch.inference_mode()
def evaluate_reader(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    scenes: int = 100,
    seed: int = 0,
    methods: tuple[str, ...] = tuple(METHODS),
    keeps: tuple[float, ...] = KEEPS,
    tiles: tuple[int, int] = (2, 2),
) -> dict:
    """Accuracy of exact answers on scenes that were not trained on.

    Args:
        model, processor: of the LLaVA-NeXT form of `emoji-vlm`.
        scenes: how many, with twelve questions each; the same for every method.
        seed: which scenes.
        methods: pruning methods; without any only the whole image is read.
        keeps: fractions of the tokens to keep, newlines included.
        tiles: rows and columns of tiles of each scene.

    Returns:
        `{"accuracy": {method: {keep: fraction}}, "by_question": {method: {keep: {kind: fraction}}}, "scenes",
        "questions", "visual_tokens"}`; method "none" has keep "1.0". Positions of kept tokens are the original ones.
    """
    scenes = check_integer("The number of scenes", scenes, 1, MAX_SCENES)
    settings = [("none", 1.0), *((method, keep) for method in methods for keep in keeps)]
    right: dict[tuple[str, float], dict[str, list[bool]]] = {setting: {} for setting in settings}
    tokens = 0
    for number in tqdm(range(scenes), desc="scenes", unit="scene"):
        scene = draw_scene(np.random.default_rng((_STREAM, seed, number)), tiles)
        texts = [(question.text, question.answer) for question in scene.questions]
        packed = pack_questions(processor.tokenizer, [texts])
        inputs = processor(images=Image.fromarray(scene.image), text=f"<image>\n{texts[0][0]}", return_tensors="pt")
        whole, read = prune_inputs(model, inputs, "uniform", 1.0)
        image, tokens = whole["mm_encoder_outputs"]["image"].pooler_output[0], read.tokens_before[0]
        for method, keep in settings:
            if method in READS_TEXT:
                hits = _hits_by_question(model, processor.tokenizer, texts, image, read.layouts[0], method, keep)
            else:
                info = read if method == "none" else prune_inputs(model, inputs, method, keep)[1]
                logits = packed_logits(model, image[None, info.kept[0]], 1 + info.kept[0], 1 + tokens, packed)
                hits = exact_answers(logits, packed)[0].tolist()
            for question, hit in zip(scene.questions, hits, strict=True):
                right[method, keep].setdefault(question.kind, []).append(hit)
    accuracy: dict[str, dict[str, float]] = {}
    by_question: dict[str, dict[str, dict[str, float]]] = {}
    for (method, keep), kinds in right.items():
        accuracy.setdefault(method, {})[str(keep)] = float(np.mean([hit for hits in kinds.values() for hit in hits]))
        shares = {kind: float(np.mean(hits)) for kind, hits in sorted(kinds.items())}
        by_question.setdefault(method, {})[str(keep)] = shares
    return {
        "accuracy": accuracy,
        "by_question": by_question,
        "scenes": scenes,
        "questions": 12 * scenes,
        "visual_tokens": tokens,
    }


@torch.inference_mode()
def evaluate_singles(
    model: PreTrainedModel, processor: ProcessorMixin, images: int = 200, seed: int = 0, side: int = 64
) -> dict[str, Any]:
    """Accuracy of exact answers about images of one emoji, as generators make them.

    Args:
        model, processor: as in `evaluate_reader`.
        images: how many, with three questions each: what it is, which style, which background.
        seed: which combinations of emoji, style and background, out of those that training leaves out.
        side: of the images in pixels.

    Returns:
        `{"accuracy": fraction, "by_question": {kind: fraction}, "images", "questions"}`.
    """
    images = check_integer("The number of images", images, 1, MAX_SCENES)
    hits: dict[str, list[bool]] = {}
    for number in tqdm(range(images), desc="images", unit="image"):
        single = draw_single(np.random.default_rng((_STREAM, seed, number)), side, held_out=True)
        texts = [(question.text, question.answer) for question in single.questions]
        packed = pack_questions(processor.tokenizer, [texts])
        inputs = processor(images=Image.fromarray(single.image), text=f"<image>\n{texts[0][0]}", return_tensors="pt")
        whole, _ = prune_inputs(model, inputs, "uniform", 1.0)
        features = whole["mm_encoder_outputs"]["image"].pooler_output[0][None]
        places = 1 + torch.arange(features.shape[1])
        right = exact_answers(packed_logits(model, features, places, 1 + features.shape[1], packed), packed)[0].tolist()
        for question, hit in zip(single.questions, right, strict=True):
            hits.setdefault(question.kind, []).append(hit)
    every = [hit for kind in hits.values() for hit in kind]
    shares = {kind: float(np.mean(right)) for kind, right in hits.items()}
    return {"accuracy": float(np.mean(every)), "by_question": shares, "images": images, "questions": len(every)}


def _hits_by_question(model, tokenizer, texts, image, layout, method: str, keep: float) -> list[bool]:
    """Whether each question is answered exactly from the tokens that are chosen for it."""
    hits = []
    for question, answer in texts:
        ids = torch.tensor(tokenizer(question, add_special_tokens=False)["input_ids"], device=image.device)
        kept = METHODS[method](image, keep, text=model.get_input_embeddings()(ids), layout=layout)
        packed = pack_questions(tokenizer, [[(question, answer)]])
        hits += exact_answers(packed_logits(model, image[None, kept], 1 + kept, 1 + len(image), packed), packed)[
            0
        ].tolist()
    return hits


@torch.inference_mode()
def evaluate_memory(
    pipe: VisualQuestionPipeline,
    settings: Sequence[tuple[str, float]],
    scenes: int = 100,
    seed: int = 0,
    tiles: tuple[int, int] = (2, 2),
) -> dict[tuple[str, float], float]:
    """Accuracy of exact answers from a compressed cache that was made before the questions were known.

    Args:
        pipe: a pipeline whose model can be remembered.
        settings: (method, keep) of `VisualQuestionPipeline.remember`, several.
        scenes, seed, tiles: as in `evaluate_reader`; the scenes are the same.

    Returns:
        For each setting the fraction of 12 questions a scene that were answered exactly.
    """
    hits: dict[tuple[str, float], list[bool]] = {setting: [] for setting in settings}
    for number in tqdm(range(scenes), desc="scenes", unit="scene"):
        scene = draw_scene(np.random.default_rng((_STREAM, seed, number)), tiles)
        for method, keep in settings:
            memory = pipe.remember(Image.fromarray(scene.image), method=method, keep=keep)
            hits[method, keep] += [
                pipe.ask(memory, question.text, max_new_tokens=8).answer == question.answer
                for question in scene.questions
            ]
    return {setting: float(np.mean(right)) for setting, right in hits.items()}


@torch.inference_mode()
def evaluate_compressed(
    pipe: VisualQuestionPipeline, scenes: int = 100, seed: int = 0, tiles: tuple[int, int] = (2, 2)
) -> dict[str, Any]:
    """Accuracy of exact answers from tokens that are made for each question (QueCC).

    Args:
        pipe: a pipeline with a compressor.
        scenes, seed, tiles: as in `evaluate_reader`; the scenes are the same, scaled to the compressor's square.

    Returns:
        `{"accuracy": {tokens: fraction}, "scenes", "questions"}`.
    """
    scenes = check_integer("The number of scenes", scenes, 1, MAX_SCENES)
    compressor = pipe.compressor_of()
    hits: dict[str, list[bool]] = {str(tokens): [] for tokens in compressor.config.tokens}
    for number in tqdm(range(scenes), desc="scenes", unit="scene"):
        scene = draw_scene(np.random.default_rng((_STREAM, seed, number)), tiles)
        texts = [[(question.text, question.answer)] for question in scene.questions]
        packed = pack_questions(pipe.processor.tokenizer, texts).to(pipe.device)
        image = compressor.square(pipe.model, Image.fromarray(scene.image))
        pixels = pipe.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        patches = compressor.read(pipe.model, pixels.to(pipe.device, pipe.model.dtype))
        for tokens, right in hits.items():
            logits = compressed_logits(pipe.model, compressor, patches, int(tokens), packed)
            right += torch.cat(exact_answers(logits, packed)).tolist()
    accuracy = {tokens: float(np.mean(right)) for tokens, right in hits.items()}
    return {"accuracy": accuracy, "scenes": scenes, "questions": 12 * scenes}


def evaluate_thinned(
    pipe: VisualQuestionPipeline, scenes: int = 100, seed: int = 0, tiles: tuple[int, int] = (2, 2)
) -> float:
    """Accuracy of exact answers with as many tokens inside the vision tower as were learned (DiffRate).

    Args:
        pipe: a pipeline whose model has learned rates.
        scenes, seed, tiles: as in `evaluate_reader`; the scenes are the same.
    """
    with merge_tokens(pipe.model, method="diffrate"):
        found = evaluate_reader(pipe.model, pipe.processor, scenes, seed, methods=(), keeps=(), tiles=tiles)
    return found["accuracy"]["none"]["1.0"]


def interval(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval of Wilson of a share of `number` independent answers."""
    z = 1.959964
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * (share * (1 - share) / number + z * z / (4 * number**2)) ** 0.5
    return middle - half, middle + half


@torch.inference_mode()
def evaluate_inside(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Sequence[tuple[str, float, int | None]],
    scenes: int = 100,
    seed: int = 0,
    tiles: tuple[int, int] = (2, 2),
) -> dict[tuple[str, float, int | None], float]:
    """Accuracy of exact answers with pruning after a layer of the language model, one prompt per question.

    Args:
        model, processor, scenes, seed, tiles: as in `evaluate_reader`; the scenes are the same.
        settings: (method, keep, after_layer) of `studio.prune`, several.

    Returns:
        For each setting the fraction of 12 questions a scene that were answered exactly.
    """
    scenes = check_integer("The number of scenes", scenes, 1, MAX_SCENES)
    hits: dict[tuple[str, float, int | None], list[bool]] = {setting: [] for setting in settings}
    processor.tokenizer.padding_side = "left"
    for number in tqdm(range(scenes), desc="scenes", unit="scene"):
        scene = draw_scene(np.random.default_rng((_STREAM, seed, number)), tiles)
        prompts = [f"<image>\n{question.text}" for question in scene.questions]
        image = Image.fromarray(scene.image)
        inputs = processor(images=[image] * len(prompts), text=prompts, padding=True, return_tensors="pt")
        one = {name: value[:1] for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
        encoded = model.model.get_image_features(**one, return_dict=True)
        generation: Any = model  # mypy takes the methods of a module for tensors
        ends = model.generation_config.eos_token_id
        for method, keep, after_layer in settings:
            again = type(encoded)(pooler_output=[*encoded.pooler_output] * len(prompts))
            seen: dict[str, Any] = {"mm_encoder_outputs": {"image": again}}
            if method == "vscan":  # it cuts before the language model too, by scores of the tower
                seen = {name: inputs[name] for name in one}
            with prune(model, method, keep, after_layer=after_layer):
                out = generation.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    **seen,
                    max_new_tokens=8,
                    do_sample=False,
                    eos_token_id=ends,
                )
            answers = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right = [text.strip() == question.answer for text, question in zip(answers, scene.questions, strict=True)]
            hits[method, keep, after_layer] += right
    return {setting: float(np.mean(right)) for setting, right in hits.items()}
