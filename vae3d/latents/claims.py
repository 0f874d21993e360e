"""Claims: which process works on what, among processes that share nothing but a folder.

A claim is a file, FOLDER/NAME.GENERATION. Its owner makes it with O_CREAT | O_EXCL, which only one process can, also on
NFS (version 3 and newer), Lustre, GPFS and BeeGFS; locks, as of the package filelock, need a lock service there that
many clusters do not run. While the owner lives, a thread of its own sets the file's time to now. A claim whose time is
older than `stale` seconds belongs to a process that was killed or lost its disk: another makes the next generation,
which again only one process can. On the same machine a dead owner is recognised at once, by its process number.

Times are compared with that of a file that was touched just now: both are the file server's, so the clocks of the nodes
do not matter. (Lustre takes the clients' times; there the clocks must agree within `stale`.)

An owner that was only slow may go on after another took over. So two may do the same work, and work must be such that
this is harmless: files are written atomically, with the same bytes whoever writes them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vae3d.io import naming

BEATS = 6  # refreshes of a claim within `stale` seconds
CLOCK = ".clock"
log = logging.getLogger("vae3d")


@dataclass(frozen=True)
class Holder:
    """The owner of a claim. silent: seconds since its last sign of life. stale: whether another may take over."""

    name: str
    host: str
    pid: int
    silent: float
    stale: bool


class Claims:
    """The claims of this process in a folder. A context manager: at its end all of them are released.

    stale: seconds without a sign of life after which a claim is another process's to take. Raises FileError if the
    folder cannot be written.
    """

    def __init__(self, folder: Path, stale: float) -> None:
        self.folder, self.stale = folder, stale
        self._token = secrets.token_hex(4)
        self._own: dict[str, Path] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        for name in [*self._own]:
            self.release(name)
        with suppress(OSError):
            self._clock.unlink()
        with suppress(OSError):  # others are at work
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim `name`; False if another process, or this one, has claimed it and is alive."""
        files = self._files().get(name, {})
        newest = max(files, default=-1)
        if files:
            holder = self._holder(name, files[newest])
            if holder is None or not holder.stale:
                return False
            log.warning(
                "%s is taken over from process %d of %s, silent for %.0f s",
                name, holder.pid, holder.host, holder.silent,
            )  # fmt: skip
        return self._make(name, newest + 1)

    def owns(self, name: str) -> bool:
        """Whether this process has claimed `name`, and no other took over."""
        file = self._own.get(name)
        return file is not None and max(self._files().get(name, {-1: None})) == _generation(file)

    def release(self, name: str) -> None:
        """Give up a claim. Claims of dead owners before it go too, unless another took over."""
        file = self._own.pop(name)
        for generation, other in self._files().get(name, {}).items():
            if generation < _generation(file):
                other.unlink(missing_ok=True)
        file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the claims of all other processes, once there is nothing left to claim."""
        own = {*self._own.values(), self._clock}
        for file in self.folder.iterdir() if self.folder.is_dir() else ():
            if file not in own:
                file.unlink(missing_ok=True)

    def holders(self) -> list[Holder]:
        """The owners of all claims, by name."""
        newest = {name: files[max(files)] for name, files in self._files().items()}
        found = (self._holder(name, file) for name, file in sorted(newest.items()))
        return [holder for holder in found if holder is not None]

    def _make(self, name: str, generation: int) -> bool:
        file = self.folder / f"{name}.{generation}"
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "space": _pid_space(), "token": self._token}
        with naming(file):
            while True:
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                    break
                except FileExistsError:
                    return False
                except FileNotFoundError:  # another process, at its end, has just removed the folder
                    continue
            with os.fdopen(descriptor, "w") as stream:
                json.dump(owner, stream)
        self._own[name] = file
        return True

    def _files(self) -> dict[str, dict[int, Path]]:
        """The files of each claim by generation."""
        found: dict[str, dict[int, Path]] = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            name, _, generation = path.name.rpartition(".")
            if name and generation.isdecimal():
                found.setdefault(name, {})[int(generation)] = path
        return found

    def _holder(self, name: str, file: Path) -> Holder | None:
        """The owner of a claim; None if it has just been released."""
        try:
            # Opened, because a client of NFS asks the server then; os.stat may answer from its cache.
            with file.open() as stream:
                text, touched = stream.read(), os.fstat(stream.fileno()).st_mtime
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return None
            raise
        try:
            owner = json.loads(text)
        except ValueError:  # not written yet
            owner = {}
        silent = max(0.0, self._now() - touched)
        return Holder(name, owner.get("host", "?"), owner.get("pid", 0), silent, silent > self.stale or _is_dead(owner))

    def _now(self) -> float:
        """The file system's time."""
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._clock.open("wb") as stream:
                stream.write(b"0")
                stream.flush()
                os.utime(stream.fileno())
                return os.fstat(stream.fileno()).st_mtime

    @property
    def _clock(self) -> Path:
        return self.folder / f"{CLOCK}-{self._token}"

    def _beat(self) -> None:
        failed = False
        while not self._ended.wait(self.stale / BEATS):
            for file in [*self._own.values()]:
                try:
                    os.utime(file)
                except FileNotFoundError:  # released, or taken over and done
                    pass
                except OSError as error:
                    if not failed:
                        log.warning("%s cannot be refreshed (%s); another process may take over", file, error.strerror)
                    failed = True


def _generation(file: Path) -> int:
    return int(file.name.rpartition(".")[2])


def _pid_space() -> int | None:
    """Identifies the container, or the machine, in which a process number means the same process."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not on Linux
        return None


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended; False for other machines, and where that is not known."""
    if owner.get("host") != socket.gethostname() or owner.get("space") != _pid_space():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, of another user
        return False
    return False
