"""The processes of one command: alone, or several that `accelerate launch` started on one machine or on many.

Light: nothing heavy is imported before processes exchange something.
"""

import os
from datetime import timedelta

from studio.errors import StudioError

_PATIENCE = timedelta(days=7)  # how long those that have finished wait for the slowest


def process_count():
    """How many processes run this command, over all machines."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_index():
    """The number of this process, from 0; process 0 speaks for all."""
    return int(os.environ.get("RANK") or 0)


def own_device():
    """The `torch.device` that the launcher gave this process, or `None` for a process that runs alone."""
    return _join().device if process_count() > 1 else None


def gather(items):
    """Collect from every process.

    Args:
        items: a list of what can be pickled.

    Returns:
        The items of all processes, those of process 0 first, in every process. All of them must call this.
    """
    if process_count() == 1:
        return list(items)
    from accelerate.utils import gather_object

    _join()
    return gather_object(list(items))


def agreed(prepare):
    """Return `prepare()`, called in every process; what fails in one of them fails in all, and is told once.

    Raises:
        StudioError: in process 0, the first one's mistake; the others end quietly.
    """
    if process_count() == 1:
        return prepare()
    result, mistakes = None, []
    try:
        result = prepare()
    except StudioError as error:
        mistakes = [str(error)]
    mistakes = gather(mistakes)
    if not mistakes:
        return result
    if process_index() > 0:
        raise SystemExit(0)
    raise StudioError(mistakes[0])


def _join():
    from accelerate import PartialState

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes", "on"}
    return PartialState(cpu=on_cpu, timeout=_PATIENCE)
