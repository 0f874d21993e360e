"""Files that only memory holds, for libraries that open a file by its name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DESCRIPTORS = Path("/proc/self/fd")
PREFIX = "vae3d-memory-"  # of temporary files


@dataclass(frozen=True)
class MemoryFile:
    """path: opens in this process, until `close`."""

    path: Path
    close: Callable[[], None]


def memory_file(content: bytes) -> MemoryFile:
    """A file with this content: in memory on Linux, elsewhere a temporary one."""
    if not hasattr(os, "memfd_create"):
        file = tempfile.NamedTemporaryFile(prefix=PREFIX)  # noqa: SIM115
        file.write(content)
        file.flush()
        return MemoryFile(Path(file.name), file.close)
    descriptor = os.memfd_create("vae3d")
    with open(descriptor, "wb", closefd=False) as stream:
        stream.write(content)
    return MemoryFile(DESCRIPTORS / str(descriptor), lambda: os.close(descriptor))


def is_memory_file(path: Path) -> bool:
    return path.parent == DESCRIPTORS or path.name.startswith(PREFIX)
