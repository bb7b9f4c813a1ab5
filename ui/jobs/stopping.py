"""Long work of a network that is given up in the middle of a call."""

from contextlib import contextmanager


class Stopped(Exception):
    """Nobody waits for this work any more."""


@contextmanager
def stoppable(network, job):
    """While this is entered, a `torch.nn.Module` looks at the stop flag of a `studio.ui.server.worker.Job` before every
    layer.

    Raises:
        Stopped: in the thread that calls the network, once the flag is set.
    """

    def look(*_):
        if job.stopped:
            raise Stopped

    hooks = [module.register_forward_pre_hook(look) for module in network.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
