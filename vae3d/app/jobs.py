"""Uploads and jobs of the page: one job runs, one waits. Everything is in one temporary folder."""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vae3d.app.process import UNEXPECTED, Stopped, Worker
from vae3d.app.settings import Limits, Settings
from vae3d.errors import UserError
from vae3d.io import naming, remove

MAX_KEPT = 8  # uploads, and results; the oldest goes first
MAX_LISTED = 2000  # files of the folders given by --videos
RESERVE = 200_000_000  # bytes that are left free on the disk
TICK = 5.0  # seconds between looks for what has expired


class Busy(UserError):
    """One job runs and another waits."""


class DiskFull(UserError):
    """The temporary folder is on a disk with too little space."""


@dataclass
class Source:
    """A file that can be reconstructed. kind: upload or listed. key: see Jobs.source. name: as the user knows it. used:
    when it was last needed."""

    kind: str
    key: str
    path: Path
    name: str
    size: int
    used: float = field(default_factory=time.monotonic)


@dataclass
class Job:
    """state: waiting, running, done, failed or cancelled. text: what it does, or what went wrong."""

    id: str
    source: Source
    settings: Settings
    folder: Path
    state: str = "waiting"
    fraction: float = 0.0
    text: str = "waiting for the job before it"
    result: dict[str, Any] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)

    def facts(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("id", "state", "fraction", "text", "result")}
        source = {"kind": self.source.kind, "key": self.source.key}
        return {**found, "name": self.source.name, "source": source, "settings": asdict(self.settings)}


class Jobs:
    """Takes jobs and runs them one after the other in a thread, which hands them to the worker.

    folder: everything is written there. videos: folders whose files can be chosen. suffixes: of files that can be read.
    checkpoints: how many there are.
    """

    def __init__(
        self, worker: Worker, folder: Path, videos: list[Path], suffixes: list[str], checkpoints: int, limits: Limits
    ) -> None:
        self.worker, self.folder, self.limits = worker, folder, limits
        self.videos, self.suffixes, self.checkpoints = [path.resolve() for path in videos], tuple(suffixes), checkpoints
        self.uploads: dict[str, Source] = {}
        self.jobs: dict[str, Job] = {}
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._lock = threading.RLock()
        self._closing = False
        self._start_thread()

    # ---- files

    def listed(self) -> dict[str, Source]:
        """The files of the folders of --videos, by a key. Links that lead out of the folder are left out."""
        found: dict[str, Source] = {}
        for number, root in enumerate(self.videos):
            for path in sorted(walk(root)):
                if len(found) == MAX_LISTED:
                    return found
                try:
                    if not (self.readable(path.name) and path.resolve().is_relative_to(root) and path.is_file()):
                        continue
                    size = path.stat().st_size
                except (OSError, RuntimeError):  # gone meanwhile; a link to itself is a RuntimeError before Python 3.13
                    continue
                name = as_text(path.relative_to(root))
                key = f"{number}/{name}"
                found[key] = Source("listed", key, path, f"{as_text(root.name)}/{name}", size)
        return found

    def readable(self, name: str) -> bool:
        """Whether a file of this name is of a known kind. `*` would make it a sequence of images."""
        return name.lower().endswith(self.suffixes) and "*" not in name and not name.startswith(".")

    @contextmanager
    def upload(self, name: str, size: int | None) -> Iterator[Upload]:
        """Take a file: write its parts to what this yields. size: that was announced, if any.

        Raises UserError for a file that is too large or of an unknown kind, DiskFull.
        """
        self.check_upload(name, size)
        key = secrets.token_urlsafe(12)
        path = self.folder / "uploads" / f"{key}{Path(name).suffix.lower()}"
        path.parent.mkdir(exist_ok=True)
        upload = Upload(key, path, name, self.limits.upload)
        try:
            yield upload
            upload.close()
            with self._lock:
                self.uploads[key] = Source("upload", key, path, name, upload.size)
                self._drop_oldest()
        finally:
            upload.close()
            if key not in self.uploads:  # broken off
                remove(path)

    def check_upload(self, name: str, size: int | None) -> None:
        if not self.readable(name):
            if "*" in name:
                raise UserError(f"{name}: has a * in its name; rename it")
            kind = f"{Path(name).suffix} files" if Path(name).suffix else "files without a suffix"
            raise UserError(f"{name}: {kind} cannot be read; known: {' '.join(self.suffixes)}")
        if size is not None and size > self.limits.upload:
            raise UserError(too_large(name, self.limits.upload))
        self._check_disk(size or 0)

    def source(self, kind: str, key: str) -> Source:
        """The file that a key of `listed` or of an upload names. Raises UserError if there is none."""
        with self._lock:
            found = (self.uploads if kind == "upload" else self.listed()).get(key)
        if found is None:
            raise UserError("the file is not there any more; choose it again")
        return found

    # ---- jobs

    def submit(self, source: Source, settings: Settings) -> Job:
        """Queue a job. Raises UserError for settings beyond the limits, Busy, DiskFull."""
        settings.check(self.limits, self.checkpoints)
        self._check_disk(0)
        with self._lock:
            if any(job.state == "waiting" for job in self.jobs.values()):
                raise Busy("one job runs and another waits already; wait for them, or cancel one")
            key = secrets.token_urlsafe(12)
            job = self.jobs[key] = Job(key, source, settings, self.folder / "jobs" / key)
            source.used = time.monotonic()
            self._drop_oldest()
            self._queue.put(job)
        return job

    def get(self, key: str) -> Job:
        """Raises KeyError for a job that is not there, or has expired."""
        with self._lock:
            job = self.jobs[key]
            job.used = job.source.used = time.monotonic()
            return job

    def remove(self, key: str) -> None:
        """Cancel a job, or delete the result of one that has ended, and its upload if no other needs it.

        Raises KeyError.
        """
        with self._lock:
            job = self.jobs[key]
            if job.state in ("running", "waiting"):  # the thread ends it, and deletes its files
                job.state, job.text = "cancelled", "cancelled"
                return
            self._forget(job)
            if job.source.path not in {other.source.path for other in self.jobs.values()}:
                self.remove_upload(job.source.key)

    def remove_upload(self, key: str) -> None:
        with self._lock:
            if key in self.uploads:
                remove(self.uploads.pop(key).path)

    def file(self, key: str, name: str) -> Path:
        """A file of a finished job. Raises KeyError unless it is one that the job wrote."""
        job = self.get(key)
        if job.state != "done" or "\0" in name:
            raise KeyError(key)
        path = (job.folder / name).resolve()
        if not path.is_relative_to(job.folder.resolve()) or not path.is_file():
            raise KeyError(name)
        return path

    def close(self) -> None:
        """Cancel everything, end the worker, delete all files."""
        with self._lock:
            self._closing = True
        self._queue.put(None)
        self._thread.join()
        self.worker.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def expire(self) -> None:
        """Delete uploads and results that were not used for limits.keep seconds."""
        with self._lock:
            oldest = time.monotonic() - self.limits.keep
            for job in [*self.jobs.values()]:
                if job.used < oldest and job.state not in ("running", "waiting"):
                    self._forget(job)
            busy = self._busy_paths()
            for key, source in [*self.uploads.items()]:
                if source.used < oldest and source.path not in busy:
                    self.remove_upload(key)

    def _drop_oldest(self) -> None:
        """Keep MAX_KEPT uploads and results."""
        ended = [job for job in self.jobs.values() if job.state not in ("running", "waiting")]
        for job in ended[:-MAX_KEPT]:
            self._forget(job)
        busy = self._busy_paths()
        idle = [key for key, source in self.uploads.items() if source.path not in busy]
        for key in idle[:-MAX_KEPT]:
            self.remove_upload(key)

    def _busy_paths(self) -> set[Path]:
        return {job.source.path for job in self.jobs.values() if job.state in ("running", "waiting")}

    def _forget(self, job: Job) -> None:
        self.jobs.pop(job.id, None)
        shutil.rmtree(job.folder, ignore_errors=True)

    def _check_disk(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < size + RESERVE:
            raise DiskFull(
                f"the disk of {self.folder} has {free / 1e6:.0f} MB left, too little; free some, or set TMPDIR to a "
                "folder on another disk before you start vae3d app"
            )

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._run_all()
        finally:
            with self._lock:
                if not self._closing:  # an error in vae3d, which Python prints as this thread ends
                    self._start_thread()

    def _run_all(self) -> None:
        while True:
            try:
                job = self._queue.get(timeout=TICK)
            except queue.Empty:
                self.expire()
                continue
            if self._closing or job is None:
                return
            self._run(job)

    def _run(self, job: Job) -> None:
        with self._lock:
            if job.state == "cancelled":
                return
            job.state, job.text = "running", "starting"

        def progress(fraction: float, text: str) -> None:
            job.fraction, job.text = fraction, text

        def stop() -> bool:
            return self._closing or job.state == "cancelled"

        result, wrong = None, UNEXPECTED
        try:
            with naming(job.folder):
                job.folder.mkdir(parents=True)
            request = {"do": "run", "path": str(job.source.path), "name": job.source.name, "folder": str(job.folder)}
            result = self.worker.ask({**request, "settings": asdict(job.settings)}, progress, stop)
        except Stopped:
            pass
        except UserError as error:
            wrong = str(error)
        finally:
            with self._lock:  # a job may have been cancelled too late to stop it
                if job.state == "running" and result is not None:
                    job.state, job.fraction, job.text, job.result = "done", 1.0, "done", result
                else:
                    shutil.rmtree(job.folder, ignore_errors=True)
                    if job.state == "running":
                        job.state, job.text = "failed", wrong
            job.used = time.monotonic()


class Upload:
    """A file that is being received."""

    def __init__(self, key: str, path: Path, name: str, limit: int) -> None:
        self.key, self.path, self.name, self.limit, self.size = key, path, name, limit, 0
        with naming(path.parent):
            self._stream = path.open("xb")

    def write(self, part: bytes) -> None:
        """Raises UserError beyond the limit, FileError, as on a full disk."""
        self.size += len(part)
        if self.size > self.limit:
            raise UserError(too_large(self.name, self.limit))
        with naming(f"the upload of {self.name}"):
            self._stream.write(part)

    def close(self) -> None:
        with naming(f"the upload of {self.name}"):
            self._stream.close()


def too_large(name: str, limit: int) -> str:
    return f"{name}: is larger than {limit / 1e6:g} MB, the limit (`--max_upload` changes it)"


def as_text(name: str | Path) -> str:
    """The name of a file, whose bytes may be no UTF-8, as JSON can hold it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def walk(root: Path) -> Iterator[Path]:
    """Files below a folder; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            yield Path(folder, name)
