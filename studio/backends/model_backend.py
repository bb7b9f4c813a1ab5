"""What backends share that call their model: they must not keep it alive, because they are cached by it."""

import weakref
from typing import Generic, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class ModelBackend(Generic[Model]):
    """Base of a backend that calls the model that it was built from."""

    def __init__(self, model: Model) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> Model:
        """The model that this backend was built from."""
        model = self._model()
        assert model is not None, "a backend is used while its model is alive"
        return model
