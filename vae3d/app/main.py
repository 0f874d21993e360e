"""A page to try autoencoders on videos: vae3d app [CHECKPOINT ...]. Flags: vae3d.commands.flags."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from vae3d.app.jobs import Jobs
from vae3d.app.process import Worker
from vae3d.app.settings import Limits
from vae3d.commands.flags import parse_app
from vae3d.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_app(argv)
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"vae3d app needs {' and '.join(missing)}: pip install -e '.[app]', or pip install fastapi uvicorn"
        )
    import uvicorn

    from vae3d.app.server import build_app

    for folder in args.videos:
        if not folder.is_dir():
            raise UserError(f"--videos {folder}: is no folder")
    limits = Limits(
        upload=int(args.max_upload * 1e6),
        frames=args.max_frames,
        height=args.max_height,
        pixels=int(args.max_megapixels * 1e6),
        wait=args.read_timeout,
        keep=60 * args.keep,
    )
    jobs = None
    with (
        exit_on_sigterm(),
        listen(args.host, args.port) as server_socket,
        temporary_folder() as folder,
    ):
        worker = Worker(tuple(args.checkpoints), args.device, (args.tile, args.tile_overlap), folder, limits)
        try:
            names = ", ".join(args.checkpoints) or "TAEF2"
            print(f"loading {names} ...", file=sys.stderr, flush=True)
            facts = worker.ask({"do": "describe"}, lambda fraction, text: None)
            jobs = Jobs(worker, folder, args.videos, facts["suffixes"], len(facts["checkpoints"]), limits)
            port, token = server_socket.getsockname()[1], secrets.token_urlsafe(24)
            hosts = [*args.allow_host, *names_of(args.host)]
            app = build_app(jobs, facts, token, hosts, cookie=f"vae3d-{port}")
            config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=2)

            class Server(uvicorn.Server):
                async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                    await super().startup(sockets)
                    for checkpoint in facts["checkpoints"]:
                        print(f"{checkpoint['name']}: {checkpoint['facts']}")
                    print(f"\nOpen {address(args.host, port)}/?token={token}\nCtrl-C ends it.", flush=True)

            try:
                Server(config).run(sockets=[server_socket])
            except KeyboardInterrupt:
                print("ended", file=sys.stderr)
        finally:
            if jobs is not None:
                jobs.close()
            worker.close()
    return 0


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for all temporary files, also of the worker, whose libraries make folders; deleted in the end."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="vae3d-app-") as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that what is open is cleaned up."""

    def leave(signum: int, _: FrameType | None) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises UserError if it is taken, or not of this machine."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
        found.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is taken, perhaps by another vae3d app; choose another with --port") from None
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return found


def names_of(host: str) -> list[str]:
    """Names by which a browser may reach a server at `host`, beside those of this machine itself."""
    try:
        anywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        anywhere = False
    return [socket.gethostname(), socket.getfqdn()] if anywhere else [host]


def address(host: str, port: int) -> str:
    """What to open: of a server that listens everywhere, by this machine's name."""
    name = names_of(host)[0]
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"
