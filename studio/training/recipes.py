"""The recipes by name, and `run`, which `studio train` calls."""

from importlib import import_module
from pathlib import Path

from studio.checkpoints.bundled import BUNDLED
from studio.errors import StudioError

RECIPES = {
    "emoji-1d": "studio.training.emoji_1d:Emoji1D",
    "emoji-1d-ar": "studio.training.emoji_1d_ar:Emoji1DAR",
    "emoji-ar": "studio.training.emoji_ar:EmojiAR",
    "emoji-bridge": "studio.training.emoji_bridge:EmojiBridge",
    "emoji-distilled": "studio.training.emoji_distilled:EmojiDistilled",
    "emoji-drafter": "studio.training.emoji_drafter:EmojiDrafter",
    "emoji-kl": "studio.training.emoji_kl:EmojiKL",
    "emoji-mar": "studio.training.emoji_mar:EmojiMAR",
    "emoji-mar-draft": "studio.training.emoji_mar_draft:EmojiMARDraft",
    "emoji-resgen": "studio.training.emoji_resgen:EmojiResGen",
    "emoji-resgen-softmax": "studio.training.emoji_resgen_softmax:EmojiResGenSoftmax",
    "emoji-rq-ar": "studio.training.emoji_rq_ar:EmojiRQAR",
    "emoji-rvq": "studio.training.emoji_rvq:EmojiRVQ",
    "emoji-tower": "studio.training.emoji_tower:EmojiTower",
    "emoji-vlm": "studio.training.emoji_vlm:EmojiVLM",
    "emoji-words": "studio.training.emoji_words:EmojiWords",
    "emoji-judge": "studio.training.emoji_judge:EmojiJudge",
    "emoji-vq": "studio.training.emoji_vq:EmojiVQ",
}


def run(
    name, *, out=None, seed=0, resume=False, init_from=None, steps=None, batch_size=None, learning_rate=None, command=""
):
    """Train a recipe.

    Args:
        name: one of `RECIPES`.
        out: folder of the run, `runs/NAME` when `None`; the model is written to its `model` folder.
        seed: everything random follows from it.
        resume: go on from the state in `out`.
        init_from: bundled name or exported folder whose weights to start from.
        steps, batch_size, learning_rate: the recipe's defaults when `None`.
        command: the command line, for the model card.

    Returns:
        `{"folder", "steps", "seconds", "loss", "quality"}`.
    """
    from studio.training.loop import Settings, train

    if name not in RECIPES:
        raise StudioError(f"There is no recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    module, cls = RECIPES[name].split(":")
    recipe = getattr(import_module(module), cls)()
    for option, value in {"steps": steps, "batch size": batch_size, "learning rate": learning_rate}.items():
        if value is not None and not 0 < value < float("inf"):
            raise StudioError(f"The {option} must be a positive number; got {value}.")
    if init_from is not None and init_from not in BUNDLED and not Path(init_from).is_dir():
        raise StudioError(f"There is no folder {init_from} to start from.")
    settings = Settings(
        recipe=name,
        steps=steps or recipe.defaults.steps,
        batch_size=batch_size or recipe.defaults.batch_size,
        learning_rate=learning_rate or recipe.defaults.learning_rate,
        seed=seed,
        init_from=None if init_from is None else str(init_from),
    )
    return train(recipe, settings, Path(out or f"runs/{name}"), resume=resume, command=command)
