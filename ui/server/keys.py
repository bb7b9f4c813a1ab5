"""Keys of the API: who may use the server."""

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from studio.checks import shown
from studio.errors import StudioError

_SHORTEST, _LONGEST = 8, 200  # characters of a key


class Keys:
    """The keys of a server, by their digests.

    Args:
        named: the key of each client.

    Raises:
        StudioError: a key that is too short, too long or not plain, or one that two clients have.
    """

    def __init__(self, named: Iterable[tuple[str, str]]) -> None:
        self._names: dict[bytes, str] = {}
        for name, key in named:
            if not _SHORTEST <= len(key) <= _LONGEST or not key.isascii() or not key.isprintable() or " " in key:
                raise StudioError(
                    f"The API key of {shown(name)} cannot be used: take {_SHORTEST} to {_LONGEST} letters and digits."
                )
            if self._names.setdefault(_digest(key), name) != name:
                raise StudioError(f"{shown(name)} has the API key of another client: give each its own.")

    def client_of(self, authorization: str) -> str | None:
        """The client of an `Authorization` header: a bearer token, or the password of basic authentication.

        Returns:
            Its name; `None` for no known key.
        """
        scheme, _, value = authorization.partition(" ")
        key = value.strip()
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return None
        elif scheme.lower() != "bearer":
            return None
        return self._names.get(_digest(key))


def read_keys(keys: Iterable[str], file: Path | None) -> Keys | None:
    """The keys of the command line and of a file with a name and a key in each line; `None` where there are none.

    Raises:
        StudioError: the file cannot be read or has none, a line has another form, a key cannot be used, or the variable
            `STUDIO_API_KEY` is set without a key, which would open the server.
    """
    named = [(f"key-{number}", key) for number, key in enumerate(keys, 1)]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StudioError(f"The file of API keys {file} cannot be read: give a readable text file.") from error
        found = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found or any(len(words) != 2 for words in found):
            raise StudioError(f"{file} has a name and a key in each line, with a space between: see docs/serving.md.")
        named += [(name, key) for name, key in found]
    if not named and not os.environ.get("STUDIO_API_KEY", "unset").strip():
        raise StudioError("STUDIO_API_KEY is empty: give a key or unset it.")
    return Keys(named) if named else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
