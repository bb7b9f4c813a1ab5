"""EVS: of a video, keep the patches that changed since the frame before.

"Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference" (arXiv:2510.14624). With the
feature f of frame t at place p,

    d[t, p] = 1 - cos(f[t, p], f[t - 1, p]),   the first frame before all others,

and the tokens with the largest d stay. A frame in which nothing moves may keep none; its timestamp stays.

Written from the paper. Deviation: cosines of the features that the language model reads instead of differences of
pixels, so that any vision tower and patch order will do.
"""

import torch
import torch.nn.functional as F

from studio.pruning.budget import count
from studio.pruning.layout import frames_of


def evs(features: torch.Tensor, budget: int | float, *, frames: int) -> torch.Tensor:
    """Keeps the first frame and what changes after it.

    Args:
        features: (T * n, D) of one video, frame by frame, places in the same order in each.
        budget: tokens to keep, or a fraction in (0, 1] of all; at least one frame stays.
        frames: T.

    Returns:
        (max(n, budget),) places, long, sorted, on the device of the features.

    Raises:
        StudioError: a budget that does not fit, or features that are no whole frames.
    """
    clip = frames_of(features, frames)
    change = 1 - F.cosine_similarity(clip[1:], clip[:-1], dim=2, eps=1e-12).flatten()
    change = torch.cat((change.new_full((clip.shape[1],), torch.inf), change))
    wanted = max(clip.shape[1], count(budget, len(features)))
    return change.argsort(descending=True, stable=True)[:wanted].sort().values
