"""Training: one recipe for every kind of model, for the emoji set and for any folder of images."""

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from studio.checks import shown
from studio.errors import StudioError
from studio.files import only_one_run
from studio.processes import process_index

KINDS = {
    "vq": "studio.training.vq:VQRecipe",
    "rvq": "studio.training.rvq:RVQRecipe",
    "kl": "studio.training.kl:KLRecipe",
    "one-d-piece": "studio.training.one_d_piece:OneDPieceRecipe",
    "text-encoder": "studio.training.text_encoder:TextEncoderRecipe",
    "llamagen": "studio.training.llamagen:LlamaGenRecipe",
    "mar": "studio.training.mar:MARRecipe",
    "xar": "studio.training.xar:XARRecipe",
    "token-bridge": "studio.training.token_bridge:TokenBridgeRecipe",
    "resgen": "studio.training.resgen:ResGenRecipe",
    "rq-transformer": "studio.training.rq_transformer:RQTransformerRecipe",
    "drafter": "studio.training.drafter:DrafterRecipe",
    "mar-drafter": "studio.training.mar_drafter:MARDrafterRecipe",
    "student": "studio.training.student:StudentRecipe",
    "reader": "studio.training.reader:ReaderRecipe",
    "tower": "studio.training.tower:TowerRecipe",
    "quecc": "studio.training.quecc:QueCCRecipe",
    "diffrate": "studio.training.diffrate:DiffRateRecipe",
    "judge": "studio.training.judge:JudgeRecipe",
}
"""The recipe of every kind."""


def train(
    *, preset: str | None = None, config: str | Path | None = None, out: str | Path | None = None,
    resume: bool = False, command: str = "", **options: Any,
) -> dict:  # fmt: skip
    """Train a model.

    Args:
        preset: one of `studio.training.options.preset_names()`, whose options are the defaults.
        config: a TOML file of options.
        out: folder of the run, `runs/NAME` when `None`; the model is written to its `model` folder.
        resume: go on from the newest state in `out`.
        command: the command line, for the model card.
        options: the fields of `studio.training.options.Options`; they win over the file, and the file over the preset.

    Returns:
        What `studio.training.loop.train` returns.

    Raises:
        StudioError: what was asked for cannot be done, or another run writes to `out`.
    """
    from studio.training.options import merge, read_preset, read_toml

    defaults = read_preset(preset) if preset else {}
    kind = options.get("kind")
    if preset and kind is not None and kind != defaults["kind"]:
        raise StudioError(f"--preset {preset} trains a {defaults['kind']}: leave the kind {kind} out.")
    asked = merge(defaults, read_toml(config) if config else {}, options)
    if asked.kind not in KINDS:
        raise StudioError(f"There is no kind {shown(asked.kind)}; choose one of {', '.join(KINDS)}.")
    from studio.training.loop import train as run

    name = preset or f"{Path(asked.data).expanduser().resolve().name}-{asked.kind}"
    out = Path(out or Path("runs") / name)
    module, recipe = KINDS[asked.kind].split(":")
    try:
        make_recipe = getattr(import_module(module), recipe)
    except ModuleNotFoundError as error:
        if error.name != "vector_quantize_pytorch":
            raise
        raise StudioError('Training needs more packages: pip install "token-studio[train]".') from error
    with only_one_run(out) if process_index() == 0 else nullcontext():
        return run(make_recipe, asked, out, find=Finder(out), resume=resume, name=name, command=command)


def train_family(
    *, minutes: float, out: str | Path | None = None, resume: bool = False, command: str = "", **options: Any
) -> dict:
    """Train the bundled models one after the other, each on those before it, in a given time.

    Args:
        minutes: in all; every preset gets its share of it (`minutes` in its file). On CUDA a step has four times the
            images that the file says.
        out: folder of the runs, one folder each; `runs` when None.
        resume: go on with a family that was stopped: finished runs are left as they are.
        command: the command line, for the model cards.
        options: none other can be given.

    Returns:
        What `train` returns, by preset.

    Raises:
        StudioError: an option that the presets decide, or no time.
    """
    from studio.training.options import FAMILY, read_preset

    if given := [name for name, value in options.items() if value is not None]:
        raise StudioError(f"The presets of the family decide {', '.join(given)}: leave that out.")
    if not minutes:
        raise StudioError("Say how long the family may train in all: --minutes M.")
    presets = {name: read_preset(name) for name in FAMILY}
    total = sum(preset["minutes"] for preset in presets.values())
    folder, results = Path(out or "runs"), {}
    for name, preset in presets.items():
        if resume and (folder / name / "model").is_dir():
            continue
        share, size = minutes * preset["minutes"] / total, preset["batch_size"] * (4 if has_cuda() else 1)
        going_on = resume and has_run(folder / name)
        how_long: dict[str, Any] = {"minutes": share, "batch_size": size}
        results[name] = train(preset=name, out=folder / name, resume=going_on, command=command, **how_long)
    return results


def has_cuda() -> bool:
    """Whether training runs on a CUDA device."""
    import torch

    return torch.cuda.is_available()


def has_run(out: Path) -> bool:
    """Whether a folder holds a run that can go on."""
    from studio.training.state import has_state

    return has_state(out)


class Finder:
    """Finds models that a run builds on.

    Args:
        out: folder of the run.
    """

    def __init__(self, out: Path):
        self.out = out

    def __call__(self, name: str) -> Path:
        """The folder of a model: the run of that name beside this one, else the bundled one, else that folder.

        Raises:
            StudioError: there is none of these.
        """
        from studio.checkpoints.bundled import BUNDLED, bundled_folder, folder_of_model, read_checksums

        beside, folder = self.out.resolve().parent / name / "model", folder_of_model(name)
        if beside.is_dir():
            return beside
        if name in BUNDLED and read_checksums().get(name):
            return bundled_folder(name)
        if folder.is_dir():
            return folder
        raise StudioError(f"There is no model {name}: name a bundled one, a folder, or a run beside {self.out}.")
