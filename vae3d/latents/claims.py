"""Claims: which process works on what, among processes that share nothing but a folder, or an object store.

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
import shutil
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vae3d.data.media import DataError
from vae3d.data.storage import objects
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
        self._leave()

    def take(self, name: str) -> bool:
        """Claim `name`; False if another process, or this one, has claimed it and is alive."""
        files = self._files().get(name, {})
        newest = max(files, default=-1)
        if files:
            holder = self._holder(name, files[newest], self._now())
            if holder is None or not holder.stale:
                return False
            _log_taken(holder)
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
        for file in self._listing():
            if file not in own:
                file.unlink(missing_ok=True)

    def holders(self) -> list[Holder]:
        """The owners of all claims, by name. Times are by this machine's clock, since nothing is written."""
        newest = {name: files[max(files)] for name, files in self._files().items()}
        found = (self._holder(name, file, time.time()) for name, file in sorted(newest.items()))
        return [holder for holder in found if holder is not None]

    def _make(self, name: str, generation: int) -> bool:
        file = self.folder / f"{name}.{generation}"
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
            try:
                with os.fdopen(descriptor, "w") as stream:
                    json.dump(_owner(self._token), stream)
            except OSError:  # a full disk; the claim would block others until it is stale
                file.unlink(missing_ok=True)
                raise
        self._own[name] = file
        return True

    def _files(self) -> dict[str, dict[int, Path]]:
        """The files of each claim by generation."""
        found: dict[str, dict[int, Path]] = {}
        for path in self._listing():
            name, _, generation = path.name.rpartition(".")
            if name and generation.isdecimal():
                found.setdefault(name, {})[int(generation)] = path
        return found

    def _listing(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:  # the last process removes the folder
            return []

    def _holder(self, name: str, file: Path, now: float) -> Holder | None:
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
        silent = max(0.0, now - touched)
        return Holder(name, owner.get("host", "?"), owner.get("pid", 0), silent, silent > self.stale or _is_dead(owner))

    def _now(self) -> float:
        """The file system's time."""
        with naming(self.folder):
            while True:
                self.folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError), self._clock.open("wb") as stream:  # removed as in _make
                    stream.write(b"0")
                    stream.flush()
                    os.utime(stream.fileno())
                    return os.fstat(stream.fileno()).st_mtime

    @property
    def _clock(self) -> Path:
        return self.folder / f"{CLOCK}-{self._token}"

    def _leave(self) -> None:
        with suppress(OSError):
            self._clock.unlink()
        with suppress(OSError):  # others are at work
            self.folder.rmdir()

    def _refresh(self, name: str) -> None:
        """Give the file of a claim the present time, unless it is not there: released, or taken over and done."""
        with suppress(FileNotFoundError):
            os.utime(self._own[name])

    def _beat(self) -> None:
        failed = False
        while not self._ended.wait(self.stale / BEATS):
            for name in [*self._own]:
                try:
                    self._refresh(name)
                except KeyError:  # released just now
                    pass
                except (OSError, DataError) as error:
                    if not failed:
                        log.warning("the claim of %s cannot be refreshed (%s); others may take over", name, error)
                    failed = True


class StoreClaims(Claims):
    """Claims as objects of a store, URL/NAME.TOKEN. Not all stores have conditional writes, so none is used.

    A process writes its object, then lists those of that name. If there is another one that is not stale, it deletes
    its own and goes on to other work: of several at once none may get the claim, but never two of them. Times are the
    store's. A process that was killed is noticed after `stale` seconds, also on its machine.

    folder: a temporary one of this process.
    """

    def __init__(self, url: str, folder: Path, stale: float) -> None:
        super().__init__(folder, stale)
        self.url = url
        self._lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> bool:
        if name in self._own or not self._all_stale(self._others(name)):
            return False
        file = self.folder / name
        file.write_text(json.dumps(_owner(self._token)))
        objects.put(file, self._object(name))
        self._own[name] = file
        others = self._others(name)
        if not self._all_stale(others):
            self.release(name)
            return False
        for other in others:
            for holder in self._holders({other: others[other]}, self._now()):
                _log_taken(holder)
            objects.remove(f"{self.url}/{other}")
        return True

    def owns(self, name: str) -> bool:
        return name in self._own and objects.find(self._object(name)) is not None

    def release(self, name: str) -> None:
        with self._lock:
            self._own.pop(name)
            objects.remove(self._object(name))

    def clear(self) -> None:
        for name in objects.listing(self.url):
            if not name.endswith(f".{self._token}"):
                objects.remove(f"{self.url}/{name}")

    def holders(self) -> list[Holder]:
        claims = {name: claim for name, claim in objects.listing(self.url).items() if not name.startswith(CLOCK)}
        return self._holders(claims, time.time())

    def _object(self, name: str) -> str:
        return f"{self.url}/{name}.{self._token}"

    def _others(self, name: str) -> dict[str, objects.Object]:
        claims = objects.listing(self.url)
        claims.pop(f"{name}.{self._token}", None)
        return {each: claim for each, claim in claims.items() if each.rpartition(".")[0] == name}

    def _all_stale(self, claims: dict[str, objects.Object]) -> bool:
        return not claims or self._now() - max(claim.modified for claim in claims.values()) > self.stale

    def _holders(self, claims: dict[str, objects.Object], now: float) -> list[Holder]:
        found = []
        for name, claim in sorted(claims.items()):
            file = self.folder / f"{name}.read"
            if objects.get(f"{self.url}/{name}", file):  # else it was released just now
                owner, silent = json.loads(file.read_text()), max(0.0, now - claim.modified)
                found.append(Holder(name.rpartition(".")[0], owner["host"], owner["pid"], silent, silent > self.stale))
        return found

    def _now(self) -> float:
        """The store's time."""
        url = f"{self.url}/{CLOCK}.{self._token}"
        file = self.folder / CLOCK
        file.write_bytes(b"0")
        objects.put(file, url)
        found = objects.find(url)
        return found.modified if found is not None else 0.0

    def _leave(self) -> None:
        objects.remove(f"{self.url}/{CLOCK}.{self._token}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _refresh(self, name: str) -> None:
        with self._lock:  # else it could write a claim again that was released meanwhile
            if self.owns(name):
                objects.put(self._own[name], self._object(name))


def _owner(token: str) -> dict[str, Any]:
    """This process, as in the content of its claims."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "space": _pid_space(), "token": token}


def _log_taken(holder: Holder) -> None:
    log.warning(
        "%s is taken over from process %d of %s, silent for %.0f s", holder.name, holder.pid, holder.host, holder.silent
    )


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
