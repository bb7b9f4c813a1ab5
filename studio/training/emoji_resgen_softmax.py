"""Recipe of `emoji-resgen-softmax`, the ablation of `emoji-resgen`: the same network, masks and drawing, with a softmax
over the codes of every level in place of the mixture of Gaussians (arXiv:2412.10208).
"""

from studio.models.resgen import ResGen
from studio.training.emoji_resgen import EmojiResGen


class EmojiResGenSoftmax(EmojiResGen):
    """Draws an emoji from words as `emoji-resgen` does, with a softmax for every level of the codes of `emoji-rvq`."""

    name = "emoji-resgen-softmax"

    def network(self, device):
        return ResGen(prediction="levels", **self.shape()).to(device)

    def tables(self, model):
        return [model.positions, model.hidden_levels.weight]
