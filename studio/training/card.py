"""The model card beside every trained model: how it was made, and what it measures."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

from studio.checkpoints.bundled import TRAINING_FILE

CARD = """---
license: {licence}
library_name: {library}
tags: [{tags}]
---
# {name}

{purpose}

| | |
|---|---|
| Made by | `{command}` |
| Started from | {init} |
| Data | {data} |
| Steps x images a step | {steps} x {batch_size} |
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


def write_card(recipe: Any, options: Any, name: str, result: dict, command: str, accelerator: Any) -> None:
    """Write `README.md`, and what the model was trained on, into the exported folder."""
    quality = "\n".join(
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in result["quality"].items()
    )
    is_emoji = recipe.source.name == "emoji"
    text = CARD.format(
        name=name,
        licence="apache-2.0" if is_emoji else "unknown",
        library=recipe.library,
        tags=", ".join([recipe.task, "studio", *(["emoji"] if is_emoji else [])]),
        purpose=recipe.purpose,
        command=command or f"studio train {recipe.kind}",
        init=options.init_from or recipe.origin,
        data=recipe.source.description,
        steps=result["steps"],
        batch_size=(options.batch_size or recipe.defaults.batch_size) * options.accumulate,
        learning_rate=options.learning_rate or recipe.defaults.learning_rate,
        seed=options.seed,
        minutes=result["seconds"] / 60,
        hardware=_hardware(accelerator),
        precision={"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        torch=torch.__version__,
        quality=quality,
    )
    folder, source = Path(result["folder"]), recipe.source
    (folder / "README.md").write_text(text, encoding="utf-8")
    about = {"kind": recipe.kind, "data": source.name, "data_checksum": source.checksum}
    (folder / TRAINING_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _hardware(accelerator):
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    processes, threads = accelerator.num_processes, torch.get_num_threads()
    return f"{_counted(processes, 'process', 'processes')}, {_counted(threads, f'{platform.machine()} CPU thread')}"


def _counted(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
