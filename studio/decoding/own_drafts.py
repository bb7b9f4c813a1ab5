"""Drafts of the drafter that belongs to a model, or, where it has none, recycled ones."""

from dataclasses import dataclass

from studio.decoding.drafter_drafts import DrafterDrafts
from studio.decoding.drafts import Drafting, Setting
from studio.decoding.recycling import Recycling
from studio.decoding.tree_choice import default_tree


@dataclass(frozen=True)
class OwnDrafts:
    """A drafter's tree has the size that suits the device (`default_tree`).

    Args:
        drawn: whether siblings are drawn at random, in a tree of fixed shape; else they are the likeliest.
    """

    drawn: bool = False

    def begin(self, setting: Setting) -> Drafting:
        if setting.drafter is None:
            return Recycling(drawn=self.drawn).begin(setting)
        return DrafterDrafts(setting.drafter, default_tree(setting.model.device, self.drawn)).begin(setting)
