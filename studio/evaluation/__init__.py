"""Metrics, the judge and benchmarks."""

from studio.errors import StudioError


def evaluate(model, *, samples=None, seed=0, device=None):
    """Measure a model on pictures it was not trained with.

    Args:
        model: a bundled name or model folder; tokenizers only, so far.
        samples, seed: for models that draw pictures; a tokenizer is always measured on every held-out picture.
        device: where it runs; CUDA where there is one when `None`.

    Returns:
        What `evaluate_tokenizer` returns.
    """
    from studio.checkpoints.loading import load
    from studio.evaluation.tokenizers import evaluate_tokenizer
    from studio.tokenizers.vq import VQTokenizer

    loaded = load(model, device=device)
    if not isinstance(loaded, VQTokenizer):
        raise StudioError(f"Only tokenizers can be evaluated so far, and {model} is none.")
    if samples is not None:
        raise StudioError("A tokenizer is measured on every held-out picture: leave out the number of samples.")
    return evaluate_tokenizer(loaded)
