"""Metrics, the judge, and the evaluation of models on held-out data."""

from pathlib import Path
from typing import Any

from studio.checks import check_integer
from studio.errors import StudioError


def evaluate(
    model: str | Path,
    *,
    samples: int | None = None,
    seed: int | None = None,
    tiles: tuple[int, int] | None = None,
    device: Any = None,
    decoding: Any = None,
    shared: bool = False,
    data: str | Path | None = None,
    features: str | None = None,
) -> dict:
    """Evaluate a model on data that it was not trained on.

    Args:
        model: a bundled name or model folder. A pipeline samples held-out combinations for the judge, the judge
            classifies real images of them, a tokenizer reconstructs held-out concepts, a vision-language model answers
            questions about scenes and about single emoji.
        samples, seed: how many combinations (500 for a pipeline, 1,000 for the judge) or scenes (100), and which (0);
            not for a tokenizer, which is always measured on every held-out image.
        tiles: rows and columns of tiles of the scenes (2, 2), without single emoji; only for vision-language models.
        device: where it runs; CUDA where there is one when `None`.
        decoding: the decoding of a pipeline, as in a call of it, or a function of the pipeline that returns one; only
            for pipelines.
        data: an image folder in place of the emoji set: a tokenizer restores its images, a generator samples their
            captions or classes. Of the folder that the model was trained on only the validation images count.
        features: a vision model of transformers, by name or folder, in whose features a generator's images of such
            data are compared; its image tokenizer's when `None`.
        shared: whether all processes of `accelerate launch` call this: each then samples a part on its
            own device, and all return the same.

    Returns:
        What `evaluate_generator`, `evaluate_judge`, `evaluate_tokenizer` or `evaluate_reader` returns; for a
        reader with a compressor also "compressed", the accuracy by number of tokens, and for one with learned rates
        "diffrate", the accuracy with these.

    Raises:
        StudioError: an option that would have no effect, or a pipeline without text conditioning.
    """
    from studio.checkpoints.loading import load
    from studio.data.source import EMOJI
    from studio.evaluation.folders import evaluate_on_folder, unseen_source
    from studio.evaluation.generators import evaluate_generator
    from studio.evaluation.judge import evaluate_judge, is_judge, load_judge
    from studio.evaluation.scenes import evaluate_compressed, evaluate_reader, evaluate_singles, evaluate_thinned
    from studio.evaluation.tokenizers import evaluate_tokenizer
    from studio.pipelines.visual_question import VisualQuestionPipeline
    from studio.processes import join
    from studio.tokenizers.kl import KLTokenizer
    from studio.tokenizers.one_d_piece import OneDPieceTokenizer
    from studio.tokenizers.rvq import RVQTokenizer
    from studio.tokenizers.token_bridge import TokenBridgeTokenizer
    from studio.tokenizers.vq import VQTokenizer

    if shared and device is None:
        device = join()
    samples = None if samples is None else check_integer("samples", samples, 1)
    seed = None if seed is None else check_integer("seed", seed)
    given = {"samples": samples, "seed": seed}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if features is not None and data in (None, EMOJI):
        raise StudioError("Images of the emoji set are compared in the judge's features: leave out --features.")
    if is_judge(model):
        _refuse(decoding)
        _refuse_data(data)
        _refuse_tiles(tiles)
        return evaluate_judge(load_judge(model, device), **chosen)
    loaded = load(model, device=device)
    tokenizers = (VQTokenizer, RVQTokenizer, OneDPieceTokenizer, TokenBridgeTokenizer, KLTokenizer)
    if isinstance(loaded, (*tokenizers, VisualQuestionPipeline)):
        _refuse(decoding)
    if not isinstance(loaded, VisualQuestionPipeline):
        _refuse_tiles(tiles)
    if isinstance(loaded, tokenizers):
        if chosen or features:
            raise StudioError("A tokenizer is measured on every unseen image: leave out --samples, --seed, --features.")
        return evaluate_tokenizer(loaded, unseen_source(model, data, loaded.config.sample_size) if data else None)
    if isinstance(loaded, VisualQuestionPipeline):
        _refuse_data(data)
        asked: dict[str, Any] = {"scenes": samples, "seed": seed, "tiles": tiles}
        asked = {name: value for name, value in asked.items() if value is not None}
        measured = evaluate_reader(loaded.model, loaded.processor, **asked)
        if loaded.compressor is not None:
            measured["compressed"] = evaluate_compressed(loaded, **asked)["accuracy"]
        if "diffrate" in (getattr(loaded.model.config, "pruning", None) or {}):
            measured["diffrate"] = evaluate_thinned(loaded, **asked)
        if tiles is None:
            asked = {"images": samples, "seed": seed}
            asked = {name: value for name, value in asked.items() if value is not None}
            measured["single"] = evaluate_singles(loaded.model, loaded.processor, **asked)
        return measured
    loaded.set_progress_bar_config(disable=True)
    how = decoding(loaded) if callable(decoding) else decoding
    if data is not None and data != EMOJI:
        source = unseen_source(model, data, loaded.image_tokenizer.config.sample_size)
        return evaluate_on_folder(loaded, source, features=features, decoding=how, **chosen)
    if not loaded.takes_text:
        raise StudioError(f"{model} is conditioned on classes: give --data, a folder with those classes.")
    return evaluate_generator(loaded, decoding=how, shared=shared, **chosen)


def _refuse(decoding):
    if decoding is not None:
        raise StudioError("Only generators have a decoding: leave it out.")


def _refuse_tiles(tiles):
    if tiles is not None:
        raise StudioError("Only vision-language models read scenes: leave out --tiles.")


def _refuse_data(data):
    if data is not None:
        raise StudioError("Judges and readers are measured on the emoji set only: leave out --data.")
