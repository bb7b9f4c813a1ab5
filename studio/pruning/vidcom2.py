"""VidCom2: frames that differ from the video keep more tokens, and in each the tokens that differ most.

"Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models" (EMNLP 2025,
arXiv:2505.14454), as in the authors' code, which made the published numbers and differs from the text. On features f of
norm 1, of the half of the channels that vary least, with the similarity to a centre c

    G(c) = sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(-||f - c||^2 / (2 a))

let v = G(mean of the video), w = G(mean of the frame), u_t = -mean of v in frame t. Frame t keeps the share

    min(1, r (1 + pi_t - mean pi)),   pi = softmax(u / 0.01)

of its tokens, those with the smallest v + w, and at least one.

Deviation: rounded by largest remainder, so that the budget is met exactly; theirs drifts with the number of frames.
"""

import torch
import torch.nn.functional as F

from studio.pruning.budget import apportion, count
from studio.pruning.layout import frames_of

_WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
_TEMPERATURE = 0.01


def vidcom2(features: torch.Tensor, budget: int | float, *, frames: int) -> torch.Tensor:
    """Keeps distinct tokens of distinct frames.

    Args:
        features: (T * n, D) of one video, frame by frame.
        budget: tokens to keep, or a fraction in (0, 1] of all; each frame keeps one at least.
        frames: T.

    Returns:
        (max(T, budget),) places, long, sorted, on the device of the features.

    Raises:
        StudioError: a budget that does not fit, or features that are no whole frames.
    """
    clip = frames_of(features, frames)
    tokens = clip.shape[1]
    wanted = max(frames, count(budget, len(features)))
    quiet = clip.flatten(0, 1).var(dim=0, correction=0).argsort(stable=True)[: max(1, clip.shape[2] // 2)]
    unit = F.normalize(clip[..., quiet], dim=2, eps=1e-12)
    of_video = _similarity(unit, unit.mean(dim=(0, 1), keepdim=True))
    scores = of_video + _similarity(unit, unit.mean(dim=1, keepdim=True))
    shares = frame_shares(of_video, wanted / len(features)).tolist()
    more = apportion(wanted - frames, [max(share * tokens - 1, 0.0) for share in shares], [tokens - 1] * frames)
    order = scores.argsort(dim=1, stable=True).cpu()
    kept = torch.cat([frame * tokens + order[frame, : 1 + number] for frame, number in enumerate(more)])
    return kept.sort().values.to(features.device)


def frame_shares(of_video: torch.Tensor, ratio: float) -> torch.Tensor:
    """(T,) the share of each frame's tokens, from the similarities v (T, n) and the ratio r of the video."""
    distinct = -of_video.mean(dim=1)
    share = ((distinct - distinct.max()) / _TEMPERATURE).softmax(dim=0)
    return (ratio * (1 + share - share.mean())).clamp(max=1)


def _similarity(unit: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """G, (T, n)."""
    distance = (unit - centre).square().sum(dim=2)
    return torch.stack([(-distance / (2 * width)).exp() for width in _WIDTHS]).sum(dim=0)
