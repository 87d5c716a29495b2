"""Triton's cache of compiled kernels: a folder of one's own, entries that are whole, one compilation of each kernel.

Triton itself writes every file of an entry under another name and renames it, and takes no lock: a process that is
killed leaves an entry without its list of files, which the next one compiles again. This file adds what Triton does
not do; docs/triton-cache.md says what was tried.
"""

import os
import struct
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction


def check_cache_folder(folder: Path) -> None:
    """Refuse a folder in which somebody else may put code: what lies in it is loaded into this process and the GPU.

    The group may write where it is the user's own, with the user's number as Linux distributions number it; not root's.

    Raises:
        RuntimeError: it belongs to another user, or others may write into it. One that does not exist yet is right.
    """
    if not folder.exists():
        return
    found, user = folder.stat(), os.geteuid()
    shared = found.st_gid != user or user == 0
    if found.st_uid != user:
        fault = f"belongs to user {found.st_uid}, this process to user {user}"
        remedy = "set TRITON_CACHE_DIR to a folder of your own"
    elif found.st_mode & 0o002 or (found.st_mode & 0o020 and shared):
        fault, remedy = f"may be written by others (mode {found.st_mode & 0o777:o})", f"chmod go-w {folder}"
    else:
        return
    raise RuntimeError(f"lr_kernels.triton: the cache of compiled kernels {folder} {fault}; {remedy}")


def compile_once(kernel: JITFunction) -> None:
    """Make threads that call a kernel first at once compile and load it once; later calls are Triton's own.

    Triton looks a key up, compiles where it is missing and lets it be found before it is loaded, all without a lock. A
    damaged entry of the cache is compiled again and replaced, with a RuntimeWarning. This is about the inside of Triton
    3.6 to 3.9; one that has no such step keeps its own ways.
    """
    if not hasattr(kernel, "_do_compile"):
        return
    lock, compile_missing = threading.RLock(), kernel._do_compile

    def locked(
        key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> CompiledKernel | None:
        with lock:
            compiled = kernel.device_caches[device][0].get(key)
            if compiled is not None:
                return compiled
            original = kernel.compile
            kernel.compile = lambda *args, **keywords: _whole(original, not warmup, *args, **keywords)
            try:
                return compile_missing(key, signature, device, constexprs, options, attrs, warmup)
            finally:
                kernel.compile = original

    kernel._do_compile = locked


def _whole(compile: Callable[..., CompiledKernel], load: bool, *args: object, **keywords: object) -> CompiledKernel:
    """The kernel that `compile` finds in the cache or makes. A damaged entry of the cache is compiled again."""
    try:
        return _loaded(compile(*args, **keywords), load)
    except (ValueError, TypeError, KeyError, StopIteration, OSError) as error:  # of reading an entry, not of compiling
        with knobs.compilation.scope():
            knobs.compilation.always_compile = True
            compiled = _loaded(compile(*args, **keywords), load)
        warnings.warn(
            f"lr_kernels: {compiled.name} was damaged in Triton's cache {knobs.cache.dir} ({error}); compiled anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return compiled


def _loaded(compiled: CompiledKernel, load: bool) -> CompiledKernel:
    """Load a kernel onto the device where it will be launched, before any other thread can find it in Triton's
    table."""
    if load:
        _check_elf(compiled.kernel)
        compiled.run  # noqa: B018  (the property loads)
    return compiled


def _check_elf(image: bytes) -> None:
    """ValueError for a binary that ends before its tables: the driver gets an address without a length."""
    if image[:4] != b"\x7fELF" or len(image) < 64:
        raise ValueError(f"no ELF file: {len(image)} bytes")
    programs, sections = struct.unpack_from("<QQ", image, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", image, 54)
    end = max(programs + program_size * program_count, sections + section_size * section_count)
    if len(image) < end:
        raise ValueError(f"{len(image)} of {end} bytes")
