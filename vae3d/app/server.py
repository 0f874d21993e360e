"""The HTTP side of the page. It opens no video and runs no model: process.Worker does.

A request is answered only if it names this machine as its host, against DNS rebinding; does not come from another
website's page; and has the token of the printed address, as a cookie, so that other users of the machine are left out.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vae3d.app.jobs import Busy, DiskFull, Jobs
from vae3d.app.settings import LATENTS, MAX_NOISE, Settings
from vae3d.errors import UserError
from vae3d.io import FileError

LOCAL = ("127.0.0.1", "localhost", "::1")
COMMON = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# Scripts and styles are in the pages; nothing is asked of another host.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' data: blob:; connect-src 'self' data: blob:; frame-src 'self'; frame-ancestors 'self'; "
    "base-uri 'none'; form-action 'none'"
)


class Request_(BaseModel):
    """A job, as the page asks for it. kind: of the file, `key`: see Jobs.source."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["upload", "listed"]
    key: str
    checkpoints: list[int]
    frames: int
    height: int
    start: int = 0
    noise: float = 0.0
    beside: bool = False
    latents: str = "none"


def build_app(jobs: Jobs, facts: Mapping[str, Any], token: str, hosts: Sequence[str], cookie: str = "vae3d") -> FastAPI:
    """facts: of worker.Runner.describe. hosts: names of this machine beside LOCAL. cookie: its name."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = render_page(jobs, facts)

    @app.get("/")
    def index() -> Response:
        return HTMLResponse(page)

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        listed = [{"key": key, "name": source.name, "size": source.size} for key, source in jobs.listed().items()]
        uploads = [{"key": key, "name": source.name, "size": source.size} for key, source in jobs.uploads.items()]
        return {"listed": listed, "uploads": uploads, "jobs": [job.facts() for job in [*jobs.jobs.values()]]}

    @app.put("/api/uploads")
    async def upload(request: Request, name: str) -> dict[str, Any]:
        name = name.replace("\\", "/").rpartition("/")[2][-200:]
        announced = request.headers.get("content-length")
        with jobs.upload(name, int(announced) if announced and announced.isdigit() else None) as file:
            async for part in request.stream():
                file.write(part)
        return {"key": file.key, "name": name, "size": file.size}

    @app.post("/api/jobs")
    def submit(request: Request_) -> dict[str, Any]:
        wanted = request.model_dump(exclude={"kind", "key"})
        settings = Settings(**{**wanted, "checkpoints": tuple(request.checkpoints)})
        return jobs.submit(jobs.source(request.kind, request.key), settings).facts()

    @app.get("/api/jobs/{key}")
    def job(key: str) -> dict[str, Any]:
        return known(lambda: jobs.get(key)).facts()

    @app.delete("/api/jobs/{key}")
    def remove(key: str) -> dict[str, Any]:
        known(lambda: jobs.remove(key))
        return {}

    @app.get("/results/{key}/{name:path}")
    def file(key: str, name: str, download: bool = False) -> Response:
        path = known(lambda: jobs.file(key, name))
        as_name = None
        if download:
            stem = Path(jobs.get(key).source.name).stem
            as_name = f"{stem}.html" if name == "index.html" else f"{stem}_{path.name}"
        policy = {"Content-Security-Policy": PAGE_POLICY} if path.suffix == ".html" else {}
        return FileResponse(path, filename=as_name, headers=policy)

    def known(find: Callable[[], Any]) -> Any:
        try:
            return find()
        except KeyError:
            raise HTTPException(404, "this result is not there any more; run the job again") from None

    @app.exception_handler(UserError)
    def user_error(_: Request, error: UserError) -> Response:
        status = {Busy: 409, DiskFull: 507, FileError: 507}.get(type(error), 400)
        return JSONResponse({"error": str(error)}, status)

    @app.exception_handler(ClientDisconnect)
    def broken_off(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # not sent; without a handler, the terminal shows a traceback

    @app.exception_handler(HTTPException)
    def http_error(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(RequestValidationError)
    def wrong_request(_: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, found['loc'][1:]))}: {found['msg']}"}, 422)

    app.add_middleware(Guard, token=token, hosts=[*LOCAL, *hosts], cookie=cookie)
    return app


def render_page(jobs: Jobs, facts: Mapping[str, Any]) -> str:
    """The page, with what does not change while the server runs."""
    folder = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(folder))
    limits = asdict(jobs.limits)
    values = {**facts, "limits": limits, "latents": LATENTS, "max_noise": MAX_NOISE, "defaults": asdict(Settings(()))}
    data = json.dumps(values).replace("<", "\\u003c")
    css = (folder.parent / "report/page.css").read_text() + (folder / "app.css").read_text()
    js = (folder / "app.js").read_text()
    return environment.get_template("app.html").render(data=Markup(data), css=Markup(css), js=Markup(js))


class Guard:
    """Refuses requests that are not of this page, and adds headers that keep other pages away."""

    def __init__(self, app: ASGIApp, token: str, hosts: Sequence[str], cookie: str) -> None:
        self.app, self.token, self.hosts, self.cookie = app, token, {host.lower() for host in hosts}, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in {"Content-Security-Policy": PAGE_POLICY, **COMMON}.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self.refusal(scope) or self.app
        await answer(scope, receive, send_with_headers)

    def refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host_name(host)
        if name not in self.hosts:
            return refuse(f"this server is not {name!r}; if that is a name of this machine, start it with --allow_host")
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            return refuse(f"requests from {origin!r} are refused")
        # A link to the page is fine, wherever it stands.
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and (
            scope["path"] != "/" or headers.get("sec-fetch-mode") != "navigate" or scope["method"] != "GET"
        ):
            return refuse("requests from other websites are refused")
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and given and self.is_token(given):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax", path="/")
            return answer
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            found = None
        if found is None or not self.is_token(found.value):
            return refuse("open the address that `vae3d app` printed, with its token, in this browser", 401)
        return None

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())


def refuse(reason: str, status: int = 403) -> Response:
    return PlainTextResponse(f"{reason}\n", status)


def host_name(host: str) -> str:
    """The name of a Host header, without the port; "" if it is no host."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
