"""Metrics, the judge and benchmarks."""

from studio.errors import StudioError


def evaluate(model, *, samples=None, seed=None, tiles=None, device=None, decoding=None, shared=False):
    """Measure a model on what its training did not see.

    Args:
        model: a bundled name or model folder. A pipeline draws held-out combinations for the judge, the judge looks
            at true pictures of them, a tokenizer restores held-out concepts, a vision-language model reads scenes.
        samples, seed: how many combinations (500 for a pipeline, 1,000 for the judge) or scenes (100), and which (0);
            not for a tokenizer, which is always measured on every held-out picture.
        tiles: rows and columns of tiles of the scenes (2, 2); only for vision-language models.
        device: where it runs; CUDA where there is one when `None`.
        decoding: how a pipeline draws, as in a call of it, or a function that says so of the pipeline; only for
            pipelines.
        shared: whether all processes of `accelerate launch` call this: each then draws a part of what a pipeline draws,
            on its own device, and all return the same.

    Returns:
        What `evaluate_generator`, `evaluate_judge`, `evaluate_tokenizer` or `evaluate_reader` returns.

    Raises:
        StudioError: an option that would change nothing, or a pipeline that cannot draw from words.
    """
    from studio.checkpoints.loading import load
    from studio.evaluation.generators import evaluate_generator
    from studio.evaluation.judge import evaluate_judge, is_judge, load_judge
    from studio.evaluation.scenes import evaluate_reader
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
    chosen = {key: value for key, value in {"samples": samples, "seed": seed}.items() if value is not None}
    if is_judge(model):
        _refuse(decoding)
        _refuse_tiles(tiles)
        return evaluate_judge(load_judge(model, device), **chosen)
    loaded = load(model, device=device)
    tokenizers = (VQTokenizer, RVQTokenizer, OneDPieceTokenizer, TokenBridgeTokenizer, KLTokenizer)
    if isinstance(loaded, (*tokenizers, VisualQuestionPipeline)):
        _refuse(decoding)
    if not isinstance(loaded, VisualQuestionPipeline):
        _refuse_tiles(tiles)
    if isinstance(loaded, tokenizers):
        if chosen:
            raise StudioError("A tokenizer is measured on every held-out picture: leave out --samples and --seed.")
        return evaluate_tokenizer(loaded)
    if isinstance(loaded, VisualQuestionPipeline):
        given = {"scenes": samples, "seed": seed, "tiles": tiles}
        scenes = {name: value for name, value in given.items() if value is not None}
        return evaluate_reader(loaded.model, loaded.processor, **scenes)
    if not loaded.takes_text:
        raise StudioError(f"{model} draws from class numbers; only pipelines that draw from words can be measured.")
    loaded.set_progress_bar_config(disable=True)
    how = decoding(loaded) if callable(decoding) else decoding
    return evaluate_generator(loaded, decoding=how, shared=shared, **chosen)


def _refuse(decoding):
    if decoding is not None:
        raise StudioError("Only pipelines that draw have a decoding: leave it out.")


def _refuse_tiles(tiles):
    if tiles is not None:
        raise StudioError("Only vision-language models read scenes: leave out --tiles.")
