"""The page of `vae3d app`: uploads, jobs, limits, errors, who may use it, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vae3d
from tests import tiny
from vae3d.commands import cli
from vae3d.errors import UserError
from vae3d.pixels import to_uint8

pytest.importorskip("fastapi", reason="vae3d app needs fastapi: pip install -e .[app]")
pytest.importorskip("uvicorn", reason="vae3d app needs uvicorn: pip install -e .[app]")
pytest.importorskip("httpx", reason="the test client of fastapi needs httpx: pip install -e .[dev]")

from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from vae3d.app import jobs as jobs_module
from vae3d.app import main, process, server, worker
from vae3d.app.jobs import Jobs
from vae3d.app.process import Worker
from vae3d.app.settings import Limits, Settings

TOKEN = "secret"
HOST = "http://localhost:8765"
WHOLE = (None, None)  # no tiles
SIZE = 16, 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    vae3d.save(tiny.model("temporal_vae"), folder)
    return str(folder)


@pytest.fixture
def videos(tmp_path) -> Path:
    """A folder for --videos: a clip in a folder, a file of no video, and links that lead out of it."""
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    tiny.write_video(folder / "sub/clip.mp4", tiny.frames(9, *SIZE))
    (folder / "notes.txt").write_text("no video")
    (tmp_path / "outside").mkdir()
    shutil.copy(folder / "sub/clip.mp4", tmp_path / "outside/secret.mp4")
    (folder / "link.mp4").symlink_to(tmp_path / "outside/secret.mp4")
    (folder / "folder").symlink_to(tmp_path / "outside")
    return folder


@contextmanager
def serving(tmp_path: Path, videos: Path, *checkpoints: str, **limits: Any) -> Iterator[tuple[TestClient, Jobs]]:
    """A client that has the token. The worker is forked from this process, with what the test has patched."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    running = Worker(checkpoints, "cpu", WHOLE, folder, Limits(**limits), method="fork")
    suffixes = [*worker.VIDEO_SUFFIXES, *worker.IMAGE_SUFFIXES]
    jobs = Jobs(running, folder, [videos], suffixes, len(checkpoints), Limits(**limits))
    facts = {"checkpoints": [{"name": "tiny", "facts": ""}], "suffixes": suffixes, "device": "cpu"}
    try:
        with TestClient(server.build_app(jobs, facts, TOKEN, []), base_url=HOST, cookies={"vae3d": TOKEN}) as client:
            yield client, jobs
    finally:
        jobs.close()
    assert not folder.exists()


def job(client: TestClient, **changes: Any) -> dict[str, Any]:
    """The answer to a request of a job on the clip of the folder."""
    wanted = {"kind": "listed", "key": "0/sub/clip.mp4", "checkpoints": [0], "frames": 9, "height": 16, **changes}
    return client.post("/api/jobs", json=wanted).json()


def ended(client: TestClient, started: dict[str, Any]) -> dict[str, Any]:
    """The job, once it has ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = client.get(f"/api/jobs/{started['id']}").json()
        if now["state"] not in ("waiting", "running"):
            return now
        time.sleep(0.02)
    raise AssertionError(now)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_uploaded_video_is_reconstructed_shown_and_downloaded_exactly(tmp_path, videos, checkpoint):
    hostile = "<img src=x onerror=alert(1)>.mp4"
    with serving(tmp_path, videos, checkpoint) as (client, _):
        content = (videos / "sub/clip.mp4").read_bytes()
        upload = client.put("/api/uploads", params={"name": f"../{hostile}"}, content=content).json()
        assert upload["name"] == hostile
        done = ended(client, job(client, kind="upload", key=upload["key"], start=2, frames=5, latents="colours"))
        assert done["state"] == "done", done
        assert done["result"]["scores"]["tiny"].keys() >= {"psnr", "ssim"}
        page = client.get(f"/results/{done['id']}/index.html")
        assert page.headers["content-security-policy"] == server.PAGE_POLICY
        assert "<img src=x" not in page.text
        assert not [
            file for file in done["result"]["files"].values() if file in page.text
        ]  # a downloaded page is alone
        assert page.text.count('class="clip" data-id=') == 2  # the videos and the latents, inside of the page

        original = vae3d.read_video(videos / "sub/clip.mp4", start=2, num_frames=5).frames
        model = vae3d.load(checkpoint)
        exact = {"original": to_uint8(original[0]), "tiny": to_uint8(vae3d.reconstruct(model, original)[0])}
        for label, frames in exact.items():
            name = done["result"]["files"][label]
            file = client.get(f"/results/{done['id']}/{name}", params={"download": True})
            assert file.headers["content-disposition"].startswith("attachment")
            (tmp_path / name).write_bytes(file.content)
            assert np.array_equal(to_uint8(vae3d.read_video(tmp_path / name).frames[0]), frames), label


def test_a_video_that_was_replaced_is_read_again(tmp_path):
    runner = worker.Runner(["tiny"], "cpu", WHOLE, Limits(), lambda *_: None)
    settings, path = Settings((0,), frames=3, height=16), tmp_path / "clip.mp4"
    tiny.write_video(path, tiny.frames(3, *SIZE))
    first = runner._read(path, "clip.mp4", settings, False)
    assert runner._read(path, "clip.mp4", settings, False) is first
    tiny.write_video(path, tiny.frames(3, *SIZE, seed=7))
    assert not np.array_equal(runner._read(path, "clip.mp4", settings, False).frames, first.frames)


def test_models_are_coded_in_tiles_and_say_so(tmp_path, checkpoint):
    runner = worker.Runner([checkpoint], "cpu", (32, 16), Limits(), lambda *_: None)
    [facts] = runner.describe()["checkpoints"]
    assert facts["facts"].endswith("coded in blended tiles of 32 x 32, overlapping by 16")
    assert runner.model(0).tiling.tile == 32
    with pytest.raises(UserError, match=f"^{checkpoint}: tile=7: "):
        worker.Runner([checkpoint], "cpu", (7, None), Limits(), lambda *_: None).describe()


def test_noise_needs_the_decoder_alone_and_grows_with_its_strength(tmp_path, videos, checkpoint, monkeypatch):
    counted = tmp_path / "coded"
    code = worker.code

    def counting(*arguments):
        with counted.open("a") as stream:
            stream.write("coded\n")
        return code(*arguments)

    monkeypatch.setattr(worker, "code", counting)
    with serving(tmp_path, videos, checkpoint) as (client, _):
        psnr = []
        for noise in (0.0, 0.5, 1.5):
            done = ended(client, job(client, noise=noise, beside=noise > 1))
            assert done["state"] == "done", done
            scores = done["result"]["scores"]
            assert list(scores) == (["tiny", "tiny, noise"] if noise > 1 else ["tiny"])
            psnr.append([*scores.values()][-1]["psnr"])
        assert scores["tiny"]["psnr"] == psnr[0] > psnr[1] > psnr[2]
        assert counted.read_text() == "coded\n"


def test_noise_is_in_units_of_the_latents_deviation():
    z = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 7 + 2
    noise = worker.with_noise(z, 0.5) - z
    assert torch.equal(noise, worker.with_noise(z, 0.5) - z)  # the same each time
    torch.testing.assert_close(noise.std() / z.std(), torch.tensor(0.5), rtol=0.1, atol=0)


def test_the_latent_of_a_frame_follows_how_a_model_extends_clips():
    """Open-Sora at their beginning, in each of its chunks; Wan, whose first frame has a latent of its own, at their end."""
    expected = {
        ("temporal_vae", "model.micro_frames=null", 10): [0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
        ("temporal_vae", "model.micro_frames=5", 10): [0, 1, 1, 1, 1, 2, 3, 3, 3, 3],
        ("wan", "model.downsample=[true]", 10): [0, 1, 1, 2, 2, 3, 3, 4, 4, 5],
        ("spatial", "model.groups=4", 3): [0, 1, 2],
    }
    for (name, override, frames), latents in expected.items():
        model = tiny.model(name, override)
        assert [worker.latent_of_frame(model, frame, frames) for frame in range(frames)] == latents, name
        assert model.latent_frames(frames) == latents[-1] + 1


@pytest.mark.parametrize("name", ["temporal_vae", "spatial", "wan"])
def test_latents_without_noise_decode_to_the_reconstruction(tmp_path, name):
    overrides = ["model.micro_frames=5"] if name == "temporal_vae" else []
    model = tiny.model(name, *overrides)
    clip = worker.Clip((), tiny.frames(9, *SIZE), None)
    done: list[int] = []
    with torch.inference_mode():
        coded = worker.code(model, clip, done.append)
        assert done[0] == 0
        assert done[-1] == 9
        decoded = worker.decode(model, coded.z, clip, done.append)
    assert np.abs(decoded.astype(int) - coded.frames).max() <= 1  # rounding of other sizes of batches


def test_pictures_of_channels_show_each_latent_where_its_frames_are():
    model = tiny.model("temporal_vae")
    z = torch.zeros(1, 4, 3, 8, 12)
    z[0, 1, 2] = 1.0  # in the last latent, of frames 5 to 8
    pictures = worker.channel_pictures(model, z, 9, colours=False)
    assert list(pictures) == [f"channel {index}" for index in range(4)]
    assert {*pictures["channel 0"].ravel().tolist()} == {128}  # constant, so at its mean
    times = pictures["channel 1"].shape[1] // 8
    assert pictures["channel 1"].shape == (9, 8 * times, 12 * times, 3)
    levels = pictures["channel 1"].mean((1, 2, 3))
    assert [level > 128 for level in levels] == [False] * 5 + [True] * 4
    red, _, blue = worker.channel_pictures(model, z, 9, colours=True)["channel 1"][8, 0, 0].astype(int)
    assert red > blue + 50


def test_a_broken_file_fails_with_its_name_and_the_next_job_runs(tmp_path, videos, checkpoint):
    broken = {"broken.mp4": b"no video" * 99, "empty.mp4": b"", "a.png": b"\x89PNG"}
    with serving(tmp_path, videos, checkpoint) as (client, _):
        for name, content in broken.items():
            upload = client.put("/api/uploads", params={"name": name}, content=content).json()
            failed = ended(client, job(client, kind="upload", key=upload["key"]))
            assert failed["state"] == "failed"
            assert failed["text"].startswith(f"{name}: ")
            assert str(tmp_path) not in failed["text"]
            assert client.get(f"/results/{failed['id']}/index.html").status_code == 404
        assert ended(client, job(client))["state"] == "done"


async def broken_off(app: Any) -> None:
    """An upload whose browser leaves in its middle. Raises what the server would print a traceback of."""
    messages = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])
    headers = [(b"host", b"localhost"), (b"cookie", f"vae3d={TOKEN}".encode())]
    asked = {"method": "PUT", "path": "/api/uploads", "query_string": b"name=a.mp4", "headers": headers}

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        pass

    await app({"type": "http", "http_version": "1.1", "scheme": "http", **asked}, receive, send)


def test_what_is_too_large_too_long_or_unknown_is_refused(tmp_path, videos, checkpoint):
    limits = {"upload": 5000, "frames": 9, "height": 64, "pixels": 16 * 24 * 5}
    with serving(tmp_path, videos, checkpoint, **limits) as (client, jobs):

        def put(name: str, content: Any) -> Any:
            return client.put("/api/uploads", params={"name": name}, content=content)

        for content in (b"x" * 5001, iter([b"x" * 3000] * 2)):  # with its length announced, and without
            answer = put("a.mp4", content)
            assert answer.status_code == 400
            assert "--max_upload" in answer.json()["error"]
        for name in ("a.exe", "mp4", "frame_*.png", ".mp4"):
            assert "error" in put(name, b"x").json()
        asyncio.run(broken_off(client.app))
        assert list((jobs.folder / "uploads").iterdir()) == []
        named = {"frames": 10, "height": 65, "start": -1, "noise": 9, "latents": "x", "checkpoints": [1]}
        assert "--max_frames" in job(client, frames=10)["error"]
        for key, value in named.items():
            assert key.rstrip("s") in job(client, **{key: value})["error"].replace("first frame", "start")
        assert "error" in job(client, checkpoints=[])
        assert "error" in job(client, frames="many")
        assert "error" in job(client, key="0/link.mp4")
        failed = ended(client, job(client, frames=6))
        assert "--max_megapixels" in failed["text"]
        assert "9 frames" in ended(client, job(client, start=9, frames=1))["text"]
        assert ended(client, job(client, frames=5))["state"] == "done"


def test_a_job_waits_another_is_refused_and_both_can_be_cancelled(tmp_path, videos, checkpoint, monkeypatch):
    code, go = worker.code, tmp_path / "go"

    def waiting(*arguments):
        until(go.exists)
        return code(*arguments)

    monkeypatch.setattr(worker, "code", waiting)
    with serving(tmp_path, videos, checkpoint) as (client, jobs):
        first = job(client)
        until(lambda: client.get(f"/api/jobs/{first['id']}").json()["text"] != "starting")
        second = job(client)
        assert second["state"] == "waiting"
        assert "waiting" in second["text"]
        refused = client.post("/api/jobs", json={"kind": "listed", "key": "0/sub/clip.mp4", "checkpoints": [0], "frames": 1, "height": 16})  # fmt: skip
        assert refused.status_code == 409
        client.delete(f"/api/jobs/{second['id']}")
        third = job(client, frames=2)
        client.delete(f"/api/jobs/{first['id']}")
        go.touch()
        assert ended(client, third)["state"] == "done"
        assert {client.get(f"/api/jobs/{j['id']}").json()["state"] for j in (first, second)} == {"cancelled"}
        assert [folder.name for folder in (jobs.folder / "jobs").iterdir()] == [third["id"]]


def raising(error: BaseException) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("code", raising(torch.OutOfMemoryError("CUDA out of memory")), "fewer frames"),
        ("code", kill, "fewer frames"),
        ("write_exact", raising(OSError(errno.ENOSPC, "No space left on device")), "No space left on device"),
        ("code", raising(ZeroDivisionError("a bug")), "the terminal"),
        ("open_media", lambda *_, **__: time.sleep(60), "--read_timeout"),
    ],
)  # fmt: skip
def test_a_job_that_fails_says_why(tmp_path, videos, checkpoint, monkeypatch, capfd, name, function, said):
    monkeypatch.setattr(worker, name, function)
    wait = {"wait": 0.3} if name == "open_media" else {}
    with serving(tmp_path, videos, checkpoint, **wait) as (client, jobs):
        failed = ended(client, job(client))
        assert failed["state"] == "failed"
        assert said in failed["text"]
        assert not (jobs.folder / "jobs" / failed["id"]).exists()
        monkeypatch.undo()
        if function is kill:
            assert ended(client, job(client))["state"] == "done"
    if "terminal" in said:
        assert "a bug" in capfd.readouterr().err


class Broken:
    """A worker that fails once as nobody expects."""

    def __init__(self) -> None:
        self.asked = 0

    def ask(self, *_: Any) -> dict[str, Any]:
        self.asked += 1
        if self.asked == 1:
            raise ZeroDivisionError("a bug")
        return {}

    def close(self) -> None: ...


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_an_error_that_nobody_expects_the_job_has_failed_and_the_next_one_runs(tmp_path, videos):
    (tmp_path / "temporary").mkdir()
    jobs = Jobs(Broken(), tmp_path / "temporary", [videos], [".mp4"], 1, Limits())
    source, settings = jobs.source("listed", "0/sub/clip.mp4"), Settings((0,), frames=3, height=16)
    first = jobs.submit(source, settings)
    until(lambda: first.state == "failed")
    assert "the terminal" in first.text
    second = jobs.submit(source, settings)
    until(lambda: second.state == "done")
    jobs.close()


@pytest.mark.parametrize("error", [OSError(errno.EAGAIN, "no more processes"), EOFError("unexpected EOF")])
def test_a_process_that_cannot_be_started_is_said(tmp_path, monkeypatch, error):
    running = Worker((), "cpu", WHOLE, tmp_path, Limits(), method="fork")
    monkeypatch.setattr(running._context.Process, "start", raising(error))
    with pytest.raises(UserError, match=str(error)[-8:]):
        running.ask({"do": "describe"}, lambda *_: None)


def test_a_process_that_ended_between_jobs_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_run", lambda connection, *_: connection.close())
    running = Worker((), "cpu", WHOLE, tmp_path, Limits(), method="fork")
    running._start()
    running._process.join()
    monkeypatch.setattr(running, "_start", lambda: None)  # it looks alive a moment before
    with pytest.raises(UserError, match="the terminal"):
        running.ask({"do": "describe"}, lambda *_: None)


def test_a_full_disk_is_said(tmp_path, videos, checkpoint, monkeypatch):
    with serving(tmp_path, videos, checkpoint) as (client, _):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(jobs_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        for answer in (client.put("/api/uploads", params={"name": "a.mp4"}, content=b"x"), client.post("/api/jobs", json={"kind": "listed", "key": "0/sub/clip.mp4", "checkpoints": [0], "frames": 1, "height": 16})):  # fmt: skip
            assert answer.status_code == 507
            assert "TMPDIR" in answer.json()["error"]


SAME = {"origin": HOST, "sec-fetch-site": "same-origin"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl
        (SAME, 200),
        ({"host": "127.0.0.1:8765"}, 200),
        ({"host": "[::1]:8765"}, 200),
        ({"host": "localhost:9000", "origin": "http://localhost:9000"}, 200),  # through ssh -L
        ({"host": "evil.example"}, 403),  # DNS rebinding
        ({"host": "localhost.evil.example:8765"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:3000"}, 403),  # another server on this machine
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"cookie": "vae3d=wrong"}, 401),
        ({"cookie": ""}, 401),
        ({"cookie": "vae3d=\xe4"}, 401),
    ],
)
def test_only_the_page_itself_may_ask(guarded, headers, status):
    given = {"cookie": f"vae3d={TOKEN}", **headers}
    encoded = {name: value.encode("latin-1") for name, value in given.items()}
    for method, path in (("GET", "/api/state"), ("PUT", "/api/uploads?name=a.exe"), ("GET", "/results/x/index.html")):
        answer = guarded.request(method, path, headers=encoded)
        assert (answer.status_code in (401, 403)) == (status != 200), (method, path, answer.text)
        if status != 200:
            assert answer.status_code == status


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("guarded")
    with serving(folder, folder / "none") as (client, _):
        client.cookies.clear()
        yield client


def test_the_printed_address_gives_the_cookie_and_a_wrong_token_does_not(guarded):
    answer = guarded.get("/", params={"token": TOKEN}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    page = guarded.get("/")
    assert page.status_code == 200
    assert "frame-ancestors 'self'" in page.headers["content-security-policy"]
    # A link on another website may open the page, and no more.
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert [guarded.get(path, headers=link).status_code for path in ("/", "/api/state")] == [200, 403]
    guarded.cookies.clear()
    assert guarded.get("/", params={"token": "wrong"}).status_code == 401
    assert guarded.get("/docs").status_code == 401
    with pytest.raises(WebSocketDisconnect), guarded.websocket_connect("/"):
        pass


def test_only_files_of_the_folders_and_of_the_job_can_be_had(tmp_path, videos, checkpoint):
    with serving(tmp_path, videos, checkpoint) as (client, jobs):
        (videos / "loop.mp4").symlink_to("loop.mp4")
        os.symlink(videos / "sub/clip.mp4", os.fsencode(videos / "sub") + b"/z\xff.mp4")
        keys = [file["key"] for file in client.get("/api/state").json()["listed"]]
        assert keys == ["0/sub/clip.mp4", "0/sub/z\\xff.mp4"]
        assert ended(client, job(client, key=keys[1], frames=1))["state"] == "done"
        for key in (
            "0/../outside/secret.mp4",
            "0/link.mp4",
            "0/folder/secret.mp4",
            str(tmp_path / "outside/secret.mp4"),
        ):
            assert "not there" in job(client, key=key)["error"]
        done = ended(client, job(client, frames=2))
        (jobs.folder / "uploads").mkdir()
        (jobs.folder / "uploads/other.mp4").touch()
        (jobs.folder / "jobs" / done["id"] / "link.mp4").symlink_to(tmp_path / "outside/secret.mp4")
        ways = (
            "..%2F..%2Fuploads%2Fother.mp4",
            "%2e%2e/%2e%2e/uploads/other.mp4",
            "link.mp4",
            "%2Fetc%2Fpasswd",
            "a%00b",
        )
        for way in ways:
            assert client.get(f"/results/{done['id']}/{way}").status_code == 404, way
        assert client.get(f"/results/%2e%2e%2f{done['id']}/index.html").status_code == 404
        assert client.get(f"/results/{done['id']}/{done['result']['files']['tiny']}").status_code == 200


def test_files_are_deleted_when_asked_and_when_nobody_looks(tmp_path, videos, checkpoint, monkeypatch):
    content = (videos / "sub/clip.mp4").read_bytes()
    with serving(tmp_path, videos, checkpoint) as (client, jobs):

        def left() -> list[str]:
            return sorted(path.suffix for path in jobs.folder.rglob("*") if path.is_file())

        def uploaded() -> dict[str, Any]:
            key = client.put("/api/uploads", params={"name": "a.mp4"}, content=content).json()["key"]
            return ended(client, job(client, kind="upload", key=key, frames=1))

        first = uploaded()
        assert left() == [".html", ".mp4", ".mp4", ".mp4"]
        client.delete(f"/api/jobs/{first['id']}")
        assert left() == []
        assert client.get(f"/api/jobs/{first['id']}").status_code == 404
        uploaded()
        jobs.limits = replace(jobs.limits, keep=-1.0)
        jobs.expire()
        assert left() == []
        monkeypatch.setattr(jobs_module, "MAX_KEPT", 1)
        for _ in range(3):
            client.put("/api/uploads", params={"name": "a.mp4"}, content=content)
        assert left() == [".mp4"]


def test_the_worker_deletes_the_folder_of_a_server_that_was_killed(tmp_path, checkpoint):
    folder = tmp_path / "temporary"
    folder.mkdir()
    ours, theirs = multiprocessing.Pipe()

    def child() -> None:
        ours.close()
        worker.serve(theirs, [checkpoint], "cpu", WHOLE, str(folder), {})

    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    ours.send_bytes(b'{"do": "describe"}')
    assert b'"name": "tiny"' in ours.recv_bytes()
    ours.close()
    theirs.close()
    process.join(60)
    assert process.exitcode == 0
    assert not folder.exists()


# ---- the command

COMMAND = """
import sys
from vae3d.app import main, process
process.Worker.ask = lambda self, *_: {{"checkpoints": [{{"name": "a", "facts": "b"}}], "suffixes": [".mp4"]}}
sys.exit(main.main({arguments}))
"""


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_the_command_prints_its_address_and_leaves_nothing_after_a_signal(tmp_path, signum, status):
    code = COMMAND.format(arguments=["--port", "0"])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=tiny.environ(TMPDIR=str(tmp_path), PYTHONPATH=str(tiny.ROOT)), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while "Open " not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        address = line.split()[1]
        assert address.startswith("http://127.0.0.1:")
        port = int(address.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)):
            assert [path.name.startswith("vae3d-app-") for path in tmp_path.iterdir()] == [True]
            process.send_signal(signum)
            assert process.wait(30) == status
    finally:
        process.kill()
        process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_a_missing_package_and_a_missing_folder_are_said(tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, said in ((["--port", str(port)], f"port {port} is taken"), (["--videos", "none"], "none")):
            with pytest.raises(SystemExit, match="2"):
                cli.main(["app", *arguments])
            assert said in capsys.readouterr().err
    monkeypatch.setattr(main, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\[app\]"):
        main.main([])


# ---- in a browser


@pytest.fixture
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on the PATH")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield found
        found.close()


@contextmanager
def over_http(client: TestClient) -> Iterator[str]:
    """The address of a server of the client's page."""
    import uvicorn

    listening = main.listen("127.0.0.1", 0)
    http = uvicorn.Server(uvicorn.Config(client.app, log_level="warning"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join()


DROP = """() => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([new Uint8Array(20001)], "large.mp4"));
    document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
}"""


def test_in_a_browser_limit_error_upload_run_play_noise_download(tmp_path, videos, checkpoint, browser):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    wrong: list[str] = []
    with serving(tmp_path, videos, checkpoint, upload=20000) as (client, jobs), over_http(client) as root:
        page = browser.new_page(reduced_motion="reduce")
        page.set_default_timeout(20000)
        page.on(
            "console",
            lambda message: message.type == "error" and "429" not in message.text and wrong.append(message.text),
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((root, "data:", "blob:")) or wrong.append(request.url)
        )
        page.goto(f"{root}/?token={TOKEN}")
        assert page.url == f"{root}/"

        page.evaluate(DROP)
        page.locator("#error", has_text="--max_upload").wait_for()
        page.set_input_files("#file", tmp_path / "broken.mp4")
        page.click("#go:enabled")
        page.locator("#error", has_text="broken.mp4: ").wait_for()

        page.set_input_files("#file", videos / "sub/clip.mp4")
        page.select_option("#latents", "grey")
        page.click("#go:enabled")
        page.wait_for_selector("#tools")
        assert page.is_hidden("#error")
        inner = page.frame_locator("iframe")
        number = inner.get_by_label("Frame number").first
        inner.locator(".stage canvas.frame").nth(1).wait_for()
        assert inner.locator(".videos tbody .open").count() == 2  # the video and its latents
        inner.get_by_role("button", name="Wipe").click()
        number.fill("3")
        number.press("Enter")

        def psnr() -> str:
            return inner.locator(".videos tbody tr", has_text="clip.mp4").locator("td").first.inner_text()

        before = psnr()
        page.locator("#noise").focus()
        for _ in range(6):  # faster than a job is taken: the newest value counts, and none is refused
            page.keyboard.press("ArrowRight")
        until(lambda: psnr() != before)  # the next page is there, at the same frame and view
        until(lambda: [*jobs.jobs.values()][-1].settings.noise == 0.3 and page.is_hidden("#state"))
        until(lambda: number.input_value() == "3")
        assert inner.get_by_role("button", name="Wipe").get_attribute("aria-pressed") == "true"
        inner.get_by_role("button", name="Play").first.click()
        until(lambda: number.input_value() not in ("3", ""))

        page.route("**/api/jobs", lambda route: route.fulfill(status=429, json={"error": "too many jobs"}))
        page.locator("#noise").press("ArrowRight")
        page.locator("#error", has_text="too many jobs").wait_for()
        assert page.locator("#noise").input_value() == "0.3"  # that of the result that is there
        assert page.inner_text("#noise-value") == "0.30"
        page.unroute("**/api/jobs")

        with page.expect_download() as download:
            page.get_by_role("link", name="page").click()
        assert download.value.suggested_filename == "clip.html"
        assert 'class="clip"' in Path(download.value.path()).read_text()
        page.reload()
        page.wait_for_selector("#tools")
        assert page.locator("#noise").input_value() == "0.3"
        left = len([*(jobs.folder / "jobs").iterdir()]) - 1
        page.click("#delete")
        page.wait_for_selector("#hint")
        assert page.locator("iframe").count() == 0
        until(lambda: len([*(jobs.folder / "jobs").iterdir()]) == left)
        page.close()
    assert wrong == []
