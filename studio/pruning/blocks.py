"""Methods of a shared model that are replaced inside a `with` block, for the thread or task that opened it alone.

The open blocks of a context lie in a `ContextVar`. The model itself holds one `_Dispatcher` per replaced method, which
looks there at each call. The first block on a model puts it in place and the last one takes it away, in whatever order
threads close them.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from studio.errors import StudioError

_LOCK = threading.Lock()
_OPEN: ContextVar[tuple["_Block", ...]] = ContextVar("blocks", default=())


class _Block:
    def __init__(self, model, methods: dict[str, Callable], kind: str):
        self.model, self.methods, self.kind, self.is_open = model, methods, kind, True


class _Dispatcher:
    """Stands in for the method `name` of a model: calls the one of the innermost open block, or the original."""

    def __init__(self, model, name: str):
        self.model, self.name, self.users = model, name, 0
        self.had_own = name in model.__dict__
        self.original = getattr(model, name)
        functools.update_wrapper(self, self.original, updated=())

    @torch._disable_dynamo(recursive=False)
    def __call__(self, *arguments, **keywords):
        for block in reversed(_OPEN.get()):
            if block.is_open and block.model is self.model and self.name in block.methods:
                return block.methods[self.name](self.original, *arguments, **keywords)
        return self.original(*arguments, **keywords)

    def __deepcopy__(self, memo):
        """A copy of the model gets the original method, bound to the copy."""
        return copy.deepcopy(self.original, memo)

    def close(self) -> None:
        if self.model.__dict__.get(self.name) is not self:
            return
        if self.had_own:
            self.model.__dict__[self.name] = self.original
        else:
            del self.model.__dict__[self.name]


@contextmanager
def block(model: torch.nn.Module, methods: dict[str, Callable], kind: str = "studio") -> Iterator[None]:
    """Within the block, in its context, `model.name(...)` is `methods[name](original, ...)`.

    Of nested blocks of one kind on one model the innermost counts. Threads and tasks that inherit the context
    (`copy_context`, `asyncio.create_task`) are inside until the block closes; all others call the model as it is.

    Args:
        model: the module itself, not a wrapper (see `studio.pruning.adapters.unwrapped`).
        methods: for each name of a method, a function of the original method and its arguments; those that the model
            does not have are left out.
        kind: what a message calls the block.

    Raises:
        StudioError: a block of another kind is open on the model in this context.
    """
    for other in _OPEN.get():
        if other.is_open and other.model is model and other.kind != kind:
            raise StudioError(
                f"{kind} cannot open inside a block of {other.kind} on the same model: close that block first, or "
                "shorten the prompt with studio.prune_inputs instead."
            )
    methods = {name: method for name, method in methods.items() if hasattr(model, name)}
    mine = _Block(model, methods, kind)
    with _LOCK:
        dispatchers = []
        for name in methods:
            dispatcher = model.__dict__.get(name)
            if not isinstance(dispatcher, _Dispatcher) or dispatcher.model is not model:
                dispatcher = model.__dict__[name] = _Dispatcher(model, name)
            dispatcher.users += 1
            dispatchers.append(dispatcher)
    _OPEN.set((*_OPEN.get(), mine))
    try:
        yield
    finally:
        mine.is_open = False
        _OPEN.set(tuple(other for other in _OPEN.get() if other is not mine))
        with _LOCK:
            for dispatcher in dispatchers:
                dispatcher.users -= 1
                if not dispatcher.users:
                    dispatcher.close()


def with_keywords(hook: Callable, given: int) -> Callable:
    """A hook for `with_kwargs=True`, left alone by calls that bring no keywords.

    torch notes a hook first and that it takes keywords afterwards. A thread that calls the module in between is never
    the one that registers the hook, so its call is none of this block's.

    Args:
        hook: called with the module and `given` further arguments.
        given: 2 for a pre-hook (arguments, keywords), 3 for a hook (arguments, keywords, output).
    """

    def called(module: torch.nn.Module, *arguments: Any) -> Any:
        return hook(module, *arguments) if len(arguments) == given else None

    return called
