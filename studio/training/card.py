"""The model card beside every trained model: how it was made, and what it measures."""

import platform
from pathlib import Path

import torch

CARD = """---
license: apache-2.0
library_name: {library}
tags: [{task}, emoji]
---
# {name}

{purpose}

| | |
|---|---|
| Made by | `{command}` |
| Started from | {init} |
| Data | {data} |
| Steps x pictures a step | {steps} x {batch_size} |
| Learning rate, seed | {learning_rate}, {seed} |
| Training time | {minutes:.0f} minutes |
| Hardware | {hardware} |
| Precision | {precision} |
| torch | {torch} |

Quality of these weights, as `studio evaluate` measures it:

| measure | value |
|---|---|
{quality}
"""


def write_card(recipe, settings, origin, result, command, accelerator):
    """Write `README.md` into the exported folder; `origin` says in words what the run started from."""
    quality = "\n".join(
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in result["quality"].items()
    )
    text = CARD.format(
        name=recipe.name,
        library=recipe.library,
        task=recipe.task,
        purpose=recipe.__doc__.strip().split("\n\n")[0].replace("\n", " "),
        command=command or f"studio train {recipe.name}",
        init=origin,
        data=recipe.data,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        minutes=result["seconds"] / 60,
        hardware=_hardware(accelerator),
        precision={"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        torch=torch.__version__,
        quality=quality,
    )
    Path(result["folder"], "README.md").write_text(text)


def _hardware(accelerator):
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    return f"{accelerator.num_processes} process(es), {torch.get_num_threads()} {platform.machine()} CPU threads"
