"""Files that only memory holds, for libraries that open a file by its name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vae3d.data.storage.files import FileRange


@contextmanager
def memory_file(name: str, content: bytes) -> Iterator[FileRange]:
    """A file with this content, within the block: in memory on Linux, elsewhere a temporary one. name: for messages."""
    if not hasattr(os, "memfd_create"):
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            yield FileRange(name, Path(file.name), 0, len(content), ())
        return
    descriptor = os.memfd_create("vae3d")
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(content)
        yield FileRange(name, Path(f"/proc/self/fd/{descriptor}"), 0, len(content), ())
    finally:
        os.close(descriptor)
