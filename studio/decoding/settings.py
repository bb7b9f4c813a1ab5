"""Settings of a decoding that leave some of their fields to whoever samples."""

from dataclasses import replace
from typing import Any, ClassVar, Self


class Fillable:
    """Base of a frozen dataclass some of whose fields may be None."""

    DEFAULTS: ClassVar[dict[str, Any]]
    """What takes the place of None."""

    def filled(self, **defaults: Any) -> Self:
        """These settings with a value for every None: one of `defaults`, such as a pipeline's, else of `DEFAULTS`."""
        missing = [name for name in self.DEFAULTS if getattr(self, name) is None]
        return replace(self, **{name: defaults.get(name, self.DEFAULTS[name]) for name in missing})  # type: ignore[type-var]
