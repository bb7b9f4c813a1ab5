"""Next-scale decoding of VAR ("Visual Autoregressive Modeling", arXiv:2404.02905): one call per scale.

All tokens of a scale are sampled from one call, independently given the coarser scales. Guidance grows with the scale:
g = strength k / (S - 1) at scale k of S, logits (1 + g) conditional - g unconditional. `next_scale` can go on from
given scales, which enter with the first scale to sample, in one call under the block-causal mask.

Deviation from the code of Distilled Decoding (arXiv:2412.17153), which goes on from scales in this way: theirs feeds
them without that mask, so that coarse scales see finer ones.
"""

from collections.abc import Callable
from typing import Any

import torch

from studio.models.var import VAR


@torch.no_grad()
def next_scale(
    model: VAR,
    tokenizer: Any,
    class_labels: torch.Tensor,
    prefix: torch.Tensor,
    end: int,
    sample: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    guidance: float = 0.0,
) -> torch.Tensor:
    """Tokens (B, m) of the first `end` scales, going on from the scales in the prefix (B, p).

    Args:
        model: a `VAR` in evaluation mode.
        tokenizer: its `VARTokenizer`, which turns scales into the model's inputs.
        class_labels: (B,).
        prefix: tokens of whole scales, possibly none.
        sample: called as (scale, guided logits (B, k, V)), returns tokens (B, k).
        guidance: strength at the last scale; 0 leaves out the unconditional rows.
    """
    begin, last, batch = model.bounds.index(prefix.shape[1]), len(model.bounds) - 2, len(prefix)
    context = model.embed_class(class_labels)
    if guidance:
        everything = torch.ones(batch, dtype=torch.bool, device=context.device)
        context = torch.cat((context, model.embed_class(class_labels, everything)))
    cache: list[list] = [[] for _ in model.blocks]
    tokens, fed = prefix, 0
    for step in range(begin, end):
        inputs = tokenizer.inputs(tokenizer.codebook[tokens])[:, max(0, model.bounds[fed] - 1) :]
        logits = model.extend(inputs.repeat(len(context) // batch, 1, 1), context, fed, step + 1, cache)
        logits = logits[:, model.bounds[step] - model.bounds[fed] :]
        if guidance:
            strength = guidance * step / max(1, last)
            conditional, unconditional = logits.chunk(2)
            logits = (1 + strength) * conditional - strength * unconditional
        tokens, fed = torch.cat((tokens, sample(step, logits)), dim=1), step + 1
    return tokens
