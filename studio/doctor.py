"""The report of `studio models` and `studio doctor`: bundled models and the state of this installation."""

import platform

from studio.checkpoints.bundled import BUNDLED, bundled_folder, read_checksums
from studio.errors import StudioError
from studio.saving import package_version

_PACKAGES = ("torch", "diffusers", "transformers", "gradio", "accelerate", "safetensors", "numpy", "pillow")


def list_models() -> list[dict]:
    """Return a row per bundled model: name, kind, state (`ok`, `missing` here, or `damaged`), summary, checksums."""
    return [_row(name) for name in BUNDLED]


def examine() -> dict:
    """Return versions, device, threads, state of the compiled step, and bundled models.

    `ok` is false when weights are missing or damaged.
    """
    import torch

    from studio import __version__
    from studio.checkpoints.loading import compiled_step

    rows = list_models()
    return {
        "ok": all(row["state"] == "ok" for row in rows),
        "versions": {
            "studio": __version__,
            "python": platform.python_version(),
            **{name: package_version(name) for name in _PACKAGES},
        },
        "device": _device(torch),
        "threads": torch.get_num_threads(),
        "compiled_step": compiled_step(),
        "models": rows,
    }


def _row(name):
    checksums = read_checksums().get(name, {})
    return {
        "name": name,
        "kind": BUNDLED[name].kind,
        "state": _state(name, checksums),
        "summary": BUNDLED[name].summary,
        "sha256": checksums,
    }


def _state(name, checksums):
    if not checksums:
        return "missing"
    try:
        bundled_folder(name)
    except StudioError:
        return "damaged"
    return "ok"


def _device(torch):
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "cpu"
