"""Compiles `native.c` on first use with the machine's C compiler, and keeps the library in the cache folder.

The library is executed, so it is loaded only from a folder that nobody else can write to, and only if it matches the
checksum stored beside it. Without such a folder, each process compiles the library again.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from studio.files import cache_folder

_PARTS = (
    "native.c", "native_threads.h", "native_vectors.h", "native_denoising.h", "native_guesses.h", "native_pixels.h",
    "native_sampling.h", "native_sums.h",
)  # fmt: skip
SOURCES = [Path(__file__).with_name(name) for name in _PARTS]
FLAGS = ("-O3", "-march=native", "-std=c11", "-ffp-contract=off", "-pthread", "-fPIC", "-shared")

logger = logging.getLogger(__name__)


def library() -> ctypes.CDLL | None:
    """The library with its functions declared; None where it is not available, after one warning with the reason."""
    return _outcome()[0]


def loaded_library() -> ctypes.CDLL:
    """The library, for callers that know that it is available."""
    loaded = library()
    assert loaded is not None, "check library() first"
    return loaded


def state() -> str:
    """The state that `studio doctor` shows: "ok", or why there is no library."""
    return _outcome()[1]


@cache
def _outcome() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("STUDIO_NATIVE") == "0":
        return None, "off, because STUDIO_NATIVE is 0"
    try:
        return find_library(), "ok"
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = f"no working C compiler: {lines[0] if lines else type(error).__name__}"
        logger.warning("Images are generated without the compiled step, which takes longer (%s).", reason)
        return None, reason


def find_library() -> ctypes.CDLL:
    """The library from the cache, compiled again if the cache has no intact one of this user.

    Raises:
        OSError, AttributeError, ValueError, SubprocessError: there is no working compiler.
    """
    compiler = _compiler()
    sources = [source.read_text() for source in SOURCES]
    key = hashlib.sha256("\0".join([*sources, *compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    file = cache_folder() / "native" / f"{key}.so"
    can_keep = True
    try:
        _check_private(file.parent)
        if _is_whole(file):
            return _declared(file)
    except OSError as error:
        can_keep, problem = False, error
    with tempfile.TemporaryDirectory(prefix="studio-native-", ignore_cleanup_errors=True) as folder:
        made = Path(folder) / f"{key}.so"
        command = [*compiler, *FLAGS, str(SOURCES[0]), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120)
        if can_keep:
            try:
                _store(made.read_bytes(), file)
                return _declared(file)
            except OSError as error:
                problem = error
        logger.warning("The compiled step cannot be kept and is compiled again each time (%s).", problem)
        return _declared(made)


def _compiler() -> list[str]:
    if chosen := shlex.split(os.environ.get("CC", "")):
        return chosen
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise FileNotFoundError("cc, gcc and clang are not on the path")


def _check_private(folder: Path) -> None:
    """Creates the folder if it does not exist.

    Raises:
        OSError: it cannot be created, is a link, belongs to another user, or others can write to it or replace it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} must be a folder of yours that nobody else can write to")
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"everybody can write to {parent}")


def _is_whole(file: Path) -> bool:
    """Whether this file exists, belongs to this user, and matches the checksum beside it."""
    try:
        found, checksum = file.lstat(), _checksum_file(file).read_text()
        is_ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        return is_ours and hashlib.sha256(file.read_bytes()).hexdigest() == checksum
    except (OSError, UnicodeDecodeError):
        return False


def _store(content: bytes, file: Path) -> None:
    _replace(content, file, 0o700)
    _replace(hashlib.sha256(content).hexdigest().encode(), _checksum_file(file), 0o600)


def _replace(content: bytes, file: Path, mode: int) -> None:
    """Writes a file atomically: it is complete under its name, or absent, even after a crash."""
    descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    try:
        with open(descriptor, "wb") as stream:
            os.fchmod(descriptor, mode)
            stream.write(content)
            stream.flush()
            os.fsync(descriptor)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def _checksum_file(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _declared(file: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(file))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    loaded.studio_blocks.argtypes, loaded.studio_blocks.restype = [pointer] * 4, None
    loaded.studio_product.argtypes = [pointer, *[number] * 5, pointer, pointer]
    loaded.studio_denoise.argtypes = [pointer] * 3
    loaded.studio_decode.argtypes = [pointer, ctypes.c_int64]
    loaded.studio_sums.argtypes = [pointer, pointer, number, number, pointer]
    loaded.studio_winners.argtypes = [pointer]
    others = ("studio_product", "studio_denoise", "studio_decode", "studio_sums", "studio_winners")
    for name in others:
        getattr(loaded, name).restype = None
    loaded.studio_lanes.argtypes, loaded.studio_lanes.restype = [], number
    return loaded


def _processor() -> str:
    """Description of the processor, so that a cache folder shared between machines has a library for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.machine() + platform.processor()
