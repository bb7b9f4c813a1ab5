"""Stop a network in the middle of a call, for networks whose calls take no `stopped` argument."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from studio.errors import check_stopped


@contextmanager
def stoppable(network: nn.Module, stopped: Callable[[], bool]) -> Iterator[None]:
    """While this is entered, a network asks before every layer whether to stop.

    Args:
        network: whose calls may be long.
        stopped: returns True once nobody waits for the result.

    Raises:
        Stopped: in the thread that calls the network.
    """

    def check(*_: Any) -> None:
        check_stopped(stopped)

    hooks = [module.register_forward_pre_hook(check) for module in network.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
