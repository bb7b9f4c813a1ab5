"""The processes of one command: alone, or several that `accelerate launch` started on one machine or on many.

Light: nothing heavy is imported before processes exchange something.
"""

import atexit
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

from studio.errors import StudioError

T = TypeVar("T")

_leaves = False
_PATIENCE = timedelta(days=7)  # how long those that have finished wait for the slowest


def process_count() -> int:
    """The number of processes that run this command, over all machines."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_index() -> int:
    """The index of this process, from 0; only process 0 prints."""
    return int(os.environ.get("RANK") or 0)


def launch_problem() -> str | None:
    """A warning when a launcher was asked for several processes and started one, otherwise `None`."""
    is_asked = "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ
    if is_asked and "WORLD_SIZE" not in os.environ:
        return (
            "accelerate launch --cpu starts one process, whatever its number: "
            "say --multi_gpu instead, which starts them on CPUs too."
        )
    return None


def join() -> Any:
    """Join the process group, if there is one.

    Returns:
        The `torch.device` that the launcher meant for this process, or `None` for a process that runs alone.
    """
    if process_count() == 1:
        return None
    import torch
    from accelerate import PartialState

    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes", "on"}
    state = PartialState(cpu=asked or not torch.accelerator.is_available(), timeout=_PATIENCE)
    _leave_at_exit(state.destroy_process_group)
    return state.device


def _leave_at_exit(leave):
    """Whoever leaves last would else be aborted, now and then, by the connections that the others closed."""
    global _leaves
    if not _leaves:
        atexit.register(leave)
        _leaves = True


def gather(items: Iterable) -> list:
    """Gather items from all processes.

    Args:
        items: a list of what can be pickled.

    Returns:
        The items of all processes, those of process 0 first, in every process. All of them must call this.
    """
    if process_count() == 1:
        return list(items)
    from accelerate.utils import gather_object

    join()
    return gather_object(list(items))


def agreed(prepare: Callable[[], T]) -> T:
    """Return `prepare()`, called in every process; a failure in one process fails in all and is reported once.

    Raises:
        StudioError: in process 0, the first one's mistake; the others end quietly.
    """
    if process_count() == 1:
        return prepare()
    results, mistakes = [], []
    try:
        results.append(prepare())
    except StudioError as error:
        mistakes.append(str(error))
    mistakes = gather(mistakes)
    if not mistakes:
        return results[0]
    if process_index() > 0:
        raise SystemExit(0)
    raise StudioError(mistakes[0])
