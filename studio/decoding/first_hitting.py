"""Drawing residual codes in a random order: ResGen's noising process run backwards, at any number of calls.

ResGen (arXiv:2412.10208) hides slots in a random order, those of a cell from the deepest up. Its network is told which
slots are hidden and not the time, so between two moments at which a slot is hit it has nothing new to say: "Masked
Diffusion Models are Secretly Time-Agnostic Masked Models" (arXiv:2409.02908) therefore draws from one hit to the next
(the first-hitting sampler) instead of through a grid of times. Here the order of the hits is drawn, and they are cut
into as many groups as there may be calls, of the sizes that the schedule gives. With one call for each code no two
codes of a picture are drawn at once and nothing is approximate but the network; with fewer calls those of a group that
lie in different cells (in the ablation: all of them) are drawn independently, which is all that is lost.

Ours: groups of planned sizes in place of random ones, so that the number of calls is exact and the same for all
pictures; the moments themselves are left out, as nothing depends on them.
"""

from dataclasses import dataclass

from studio.decoding.residual_laws import gumbel_noise
from studio.decoding.residual_steps import ResidualSteps


@dataclass(frozen=True, kw_only=True)
class FirstHitting(ResidualSteps):
    """Settings for `residual_unmasking`, which then shows slots in a random order: those of `ResidualSteps`."""

    def preference(self, law, codes, fading, generators):
        """Noise (B, L, D): any hidden slot is as likely as any other."""
        return gumbel_noise(codes, generators)
