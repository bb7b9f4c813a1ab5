"""The library that `native.c` is compiled to, on first use, with the machine's C compiler; it is kept in the cache."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from studio.files import cache_folder

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-std=c11", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")

logger = logging.getLogger(__name__)


@cache
def library():
    """The library with its functions declared, or `None` where it cannot be had."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or os.environ.get("STUDIO_NATIVE") == "0":
        return None
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    file = cache_folder() / f"native-{key}.so"
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{file.name}.{os.getpid()}.part")
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            partial.replace(file)
        loaded = ctypes.CDLL(str(file))
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        loaded.studio_blocks.argtypes, loaded.studio_blocks.restype = [pointer] * 4, None
        loaded.studio_product.argtypes = [pointer, *[number] * 5, pointer, pointer]
        loaded.studio_denoise.argtypes = [pointer] * 3
        loaded.studio_product.restype = loaded.studio_denoise.restype = None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.info("No compiled decoding step (%s): %s", compiler, getattr(error, "stderr", None) or error)
        return None
    return loaded


def _processor() -> str:
    """What `-march=native` depends on, so that a cache folder shared between machines holds a library for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.machine() + platform.processor()
