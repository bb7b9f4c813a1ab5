"""The diffusion head of MAR at work (arXiv:2406.11838, section 3): the reverse steps that make a token of a condition.

The head turns a condition into a token by DDPM's reverse steps (arXiv:2006.11239) with MAR's guidance. The noise is
guided, `unconditional + scale * (conditional - unconditional)`, and the variance is the conditional one; both
conditions see one state.

Times are embedded once for all calls, conditions once for all steps, and the shifts, scales and gates of many steps are
one product; on a CPU a step is one call of C where that works.
"""

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch

from studio import backends
from studio.models.masked_autoencoder import MaskedAutoencoder

_PREPARED_NUMBERS = 2**22
_MOST_SCHEDULES = 32


class TimedHead:
    """A `DiffusionLoss` with a schedule of `steps` steps, its times embedded.

    `latest_time` is that of `GaussianDiffusion`.
    """

    def __init__(self, head: Any, steps: int, latest_time: int | None = None) -> None:
        self.network, self.loss = head.net, head
        network = self.network
        modulations = [layer.adaLN_modulation[1] for layer in (*network.res_blocks, network.final_layer)]
        self.numbers = sum(layer.out_features for layer in modulations)
        self.native = backends.select_head(network)
        self._space(steps, latest_time)

    def respaced(self, steps: int, latest_time: int | None = None) -> "TimedHead":
        """The same head with another schedule."""
        other = copy(self)
        other._space(steps, latest_time)
        return other

    def _space(self, steps: int, latest_time: int | None) -> None:
        self.diffusion = self.loss.schedule(steps, latest_time)
        self.times = self.network.time_embed(self.diffusion.timestep_map.to(self.network.input_proj.weight.device))
        self.table = self.diffusion.table()


class ReverseTransitions:
    """The Gaussian reverse kernels of n tokens.

    Args:
        head: whose steps are T.
        conditions: (S, n, C): the conditional vectors, and with S = 2 the unconditional ones behind them.
        scale: of guidance, a number or (n, 1); without meaning when S = 1.
    """

    def __init__(self, head: TimedHead, conditions: torch.Tensor, scale: float | torch.Tensor) -> None:
        self.head, self.scale, self.steps = head, scale, head.diffusion.steps
        self.embedded = head.network.cond_embed(conditions)
        self.span = max(1, _PREPARED_NUMBERS // max(1, self.embedded[..., 0].numel() * head.numbers))
        self.first = self.steps
        self.prepared: list[torch.Tensor] = []

    def at(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log of the standard deviation (m, D) of the state before x (m, D), of the first m tokens.

        What a step shares with those below it is prepared when it is first asked for: ask from the last step down.
        """
        if step < self.first:
            self._prepare(max(0, step + 1 - self.span), step + 1)
        within = slice(step - self.first, step - self.first + 1)
        if self._is_native(x):
            mean, log_std = self._in_c(x[None], [part[within] for part in self.prepared], slice(step, step + 1))
            return mean[0], log_std[0]
        modulated = [part[within.start, :, : len(x)] for part in self.prepared]
        return self._guided(self.head.network.denoise(self._state(x), modulated), x, step)

    def along(self, states: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`at` for states (t, n, D) of the steps first to first + t - 1, all in one call of the network."""
        means, log_stds = [], []
        for begin in range(0, len(states), self.span):
            part = states[begin : begin + self.span]
            steps = slice(first + begin, first + begin + len(part))
            self._prepare(steps.start, steps.stop)
            if self._is_native(part):
                mean, log_std = self._in_c(part, self.prepared, steps)
            else:
                outputs = self.head.network.denoise(self._state(part)[:, None], self.prepared)
                mean, log_std = self._guided(outputs.transpose(0, 1), part, steps)
            means.append(mean)
            log_stds.append(log_std)
        return torch.cat(means), torch.cat(log_stds)

    def take(self, rows: torch.Tensor) -> "ReverseTransitions":
        """Those of some of the tokens."""
        taken = copy(self)
        taken.embedded = self.embedded[:, rows]
        taken.prepared = [part[:, :, rows] for part in self.prepared]
        taken.scale = self.scale[rows] if isinstance(self.scale, torch.Tensor) else self.scale
        return taken

    def _prepare(self, first: int, end: int) -> None:
        self.first = first
        self.prepared = self.head.network.modulations(self.head.times[first:end, None, None] + self.embedded)

    def _is_native(self, x: torch.Tensor) -> bool:
        return self.head.native is not None and x.dtype == torch.float32

    def _in_c(self, x: torch.Tensor, prepared: list[torch.Tensor], steps: slice):
        scale, n = self.scale, x.shape[1]
        scales = scale[:n, 0].to(x) if isinstance(scale, torch.Tensor) else torch.full((n,), float(scale))
        assert self.head.native is not None
        return self.head.native(x, prepared, scales, self.head.table[steps], self.head.diffusion.limit)

    def _state(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.embedded.dtype)

    def _guided(self, outputs: torch.Tensor, x: torch.Tensor, steps: int | slice):
        noise, logit = outputs[0].to(x.dtype).chunk(2, dim=-1)
        if len(outputs) == 2:
            unconditional = outputs[1, ..., : x.shape[-1]].to(x.dtype)
            scale = self.scale[: x.shape[-2]] if isinstance(self.scale, torch.Tensor) else self.scale
            noise = torch.lerp(unconditional, noise, scale)
        return self.head.diffusion.reverse(x, noise, logit, steps)


def denoise(
    kernels: ReverseTransitions, x: torch.Tensor, noise: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The reverse steps from x_T (n, D): `(step, state, mean, log_std)` for steps T - 1 to 0.

    The last mean is the token. The standard deviation of a step is multiplied by the temperature, a number or (n, 1);
    `log_std` is without it. `noise` (T, n, D) is indexed by the step.
    """
    for step in reversed(range(kernels.steps)):
        mean, log_std = kernels.at(x, step)
        yield step, x, mean, log_std
        x = mean + temperature * log_std.exp() * noise[step]


class TimedHeads:
    """The heads of a `MAR` by their schedules, the latest ones of which are kept."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        self.loss = model.diffloss
        self.known: dict[tuple[int, int | None], TimedHead] = {}

    def of(self, steps: int, latest_time: int | None = None) -> TimedHead:
        """That of so many denoising steps; `latest_time` as of `GaussianDiffusion`."""
        schedule = steps, latest_time
        if schedule not in self.known:
            first = next(iter(self.known.values()), None)
            if len(self.known) == _MOST_SCHEDULES:
                del self.known[next(iter(self.known))]
            self.known[schedule] = first.respaced(*schedule) if first else TimedHead(self.loss, *schedule)
        return self.known[schedule]
