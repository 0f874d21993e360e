"""Finding pretrained networks, and the script that fetches them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import tiny
from tests.test_slim_weights import trunk
from vae3d.commands import fetch_weights as fetch_weights_command
from vae3d.metrics.registry import METRICS
from vae3d.pretrained import weights
from vae3d.pretrained.weights import FILES, WeightFile, WeightsMissing, find

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()
GIT_BLOB = hashlib.sha1(b"blob 5120\0" + CONTENT).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()

NET = WeightFile("net.pth", "http://nowhere", "MIT", ("psnr",), len(CONTENT), SHA256, aliases=("old-net",))
SECOND = WeightFile("second.pt", "http://nowhere", "MIT", ("psnr",), git_blob=GIT_BLOB, alternative_to="net.pth")
UNSURE = WeightFile("unsure.pth", "http://nowhere", "non-commercial", ("ssim",), sha256=OTHER, certain=False)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The folders that are searched, empty; hashes count, as outside the tests."""
    monkeypatch.delenv("VAE3D_ALLOW_UNVERIFIED")
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights, "FILES", {file.name: file for file in (NET, SECOND, UNSURE)})
    folders = weights.search_path()
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def put(folder: Path, name: str, content: bytes = CONTENT) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# --- find


def test_the_own_folder_is_searched_before_torch_hubs(places):
    own, hub = places
    second = put(hub, "net.pth")
    assert find("net.pth") == second
    first = put(own, "net.pth")
    assert find("net.pth") == first


@pytest.mark.parametrize("variables", [{}, {"XDG_CACHE_HOME": "/cache"}, {"TORCH_HOME": "~/torch"}])
def test_torch_hub_is_where_torch_keeps_it(monkeypatch, variables):
    for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert weights.search_path()[-1] == Path(torch.hub.get_dir()) / "checkpoints"


def test_a_path_is_believed_but_must_exist(places, tmp_path):
    path = put(tmp_path, "anything", b"other")
    assert find("net.pth", path=path) == path
    assert find("net.pth", "second.pt", path=str(path)) == path
    with pytest.raises(WeightsMissing, match=r"nowhere: no such file; expected net\.pth \(5,120 bytes"):
        find("net.pth", path=tmp_path / "nowhere")


def test_an_alias_will_do(places):
    path = put(places[1], "old-net")
    assert find("net.pth") == path


def test_alternatives_are_tried_in_order_in_each_place(places):
    own, hub = places
    in_hub = put(hub, "net.pth")
    assert find("net.pth", "second.pt") == in_hub
    second = put(own, "second.pt")
    assert find("net.pth", "second.pt") == second
    first = put(own, "net.pth")
    assert find("net.pth", "second.pt") == first


def test_a_file_of_another_hash_is_refused_with_both_hashes(places):
    path = put(places[0], "net.pth", b"other")
    with pytest.raises(WeightsMissing) as error:
        find("net.pth")
    assert str(path) in str(error.value)
    assert f"sha256 {SHA256}" in str(error.value)
    assert f"it has 5 bytes and sha256 {OTHER}" in str(error.value)


def test_a_file_without_sha256_is_verified_as_git_stores_it(places):
    path = put(places[0], "second.pt")
    assert find("second.pt") == path
    put(places[0], "second.pt", CONTENT[:-1])
    with pytest.raises(WeightsMissing, match=f"git blob {GIT_BLOB}.*it has 5,119 bytes and git blob"):
        find("second.pt")


def test_git_blob_is_the_hash_that_git_gives(tmp_path):
    assert weights.git_blob(put(tmp_path, "file", b"hello\n")) == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_hash_from_one_source_only_is_warned_of(places, caplog):
    path = put(places[0], "unsure.pth")
    with caplog.at_level(logging.WARNING, "vae3d"):
        assert find("unsure.pth") == path
    assert OTHER in caplog.text
    assert SHA256 in caplog.text


def test_a_file_is_warned_of_once(places, caplog):
    put(places[0], "unsure.pth")
    with caplog.at_level(logging.WARNING, "vae3d"):
        find("unsure.pth")
        find("unsure.pth")
        assert len(caplog.records) == 1
        put(places[0], "unsure.pth", b"changed")
        find("unsure.pth")
        assert len(caplog.records) == 2


def test_unverified_files_are_used_on_demand_only(places, monkeypatch):
    path = put(places[0], "net.pth", b"other")
    monkeypatch.setenv("VAE3D_ALLOW_UNVERIFIED", "1")
    assert find("net.pth") == path
    with pytest.raises(WeightsMissing):
        weights.verify(path, NET, always=True)


def test_nothing_found_says_what_where_and_how(places):
    own, hub = places
    with pytest.raises(WeightsMissing) as error:
        find("net.pth", "second.pt")
    for part in (
        f"net.pth (5,120 bytes, sha256 {SHA256}; for psnr) or second.pt (git blob {GIT_BLOB}; for psnr)",
        "old-net",
        f"{own}, {hub}",
        f": vae3d fetch-weights net.pth --dest {own}\n",
        ": export VAE3D_WEIGHTS=/path",
    ):
        assert part in str(error.value)


def test_the_hugging_face_cache_is_the_last_place(places, tmp_path):
    """In a process of its own: huggingface_hub looks at HF_HOME when it is imported."""
    repository = tmp_path / "hf/hub/models--flateon--FVD-I3D-torchscript"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abcd")
    (repository / "snapshots/0123abcd").mkdir(parents=True)
    cached = put(repository / "snapshots/0123abcd", "i3d_torchscript.pt")
    in_hub = put(places[1], "i3d_torchscript.pt")
    aside = in_hub.rename(tmp_path / "aside")
    code = (
        "import os, sys\n"
        "from vae3d.pretrained.weights import find\n"
        "print(find('i3d_pretrained_400.pt', 'i3d_torchscript.pt'))\n"
        "os.rename(*sys.argv[1:])\n"
        "print(find('i3d_pretrained_400.pt', 'i3d_torchscript.pt'))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "VAE3D_ALLOW_UNVERIFIED": "1"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code, aside, in_hub], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(cached), str(in_hub)]


def test_the_hugging_face_cache_is_named_where_nothing_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"searched .*, the Hugging Face cache of flateon/FVD-I3D-torchscript"):
        find("i3d_torchscript.pt")


# --- the files


def test_published_hashes_are_those_that_torchvision_and_torch_fidelity_abbreviate():
    hashed = [file for file in FILES.values() if file.name.endswith(".pth") and not file.name.startswith("taef2")]
    assert len(hashed) == 5
    for file in hashed:
        assert file.sha256.startswith(file.name.split("-")[-1].removesuffix(".pth"))


@pytest.mark.parametrize("file", FILES.values(), ids=lambda file: file.name)
def test_every_file_can_be_verified_and_its_alternative_exists(file):
    assert len(file.sha256 or file.git_blob) == (64 if file.sha256 else 40)
    assert file.alternative_to is None or FILES[file.alternative_to].used_for == file.used_for


def test_metrics_are_served_by_the_files_that_they_look_for():
    for metric, entry in METRICS.items():
        for names in entry.files:
            assert all(metric in FILES[name].used_for for name in names), metric


# --- fetch_weights


class Server(BaseHTTPRequestHandler):
    """Serves one file from the byte in the Range header. breaks: number of bytes after which each reply breaks off."""

    def __init__(self, content: bytes, asked: list[str | None], breaks: list[int], *args) -> None:
        self.content, self.asked, self.breaks = content, asked, breaks
        super().__init__(*args)

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        rest = self.content[start:]
        self.send_response(416 if wanted and not rest else 206 if wanted else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.breaks.pop()] if self.breaks else rest)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def serve():
    """serve(content, *breaks): the address of a server, and the Range headers that it receives."""
    servers = []

    def start(content: bytes, *breaks: int) -> tuple[str, list[str | None]]:
        asked: list[str | None] = []
        servers.append(HTTPServer(("127.0.0.1", 0), partial(Server, content, asked, list(breaks))))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fetch_weights(places, monkeypatch) -> ModuleType:
    """The script, with the files of `places`."""
    monkeypatch.setattr(fetch_weights_command, "FILES", weights.FILES)
    return fetch_weights_command


def test_weights_are_fetched_verified_and_entered(fetch_weights, serve, tmp_path, capsys):
    address, _ = serve(CONTENT)
    folder = tmp_path / "new/folder"
    assert fetch_weights.main(["net.pth", "--dest", str(folder), "--mirror", address]) == 0
    assert (folder / "net.pth").read_bytes() == CONTENT
    entry = json.loads((folder / "manifest.json").read_text())["net.pth"]
    assert entry == {"name": "net.pth", "bytes": 5120, "sha256": SHA256, "licence": "MIT", "url": "http://nowhere"}
    assert f"{folder}/net.pth: verified (MIT)" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_fetched_again(fetch_weights, serve, places):
    address, asked = serve(CONTENT)
    put(places[0], "old-net")
    assert fetch_weights.main(["net.pth", "--mirror", address]) == 0
    assert asked == []


def test_the_list_of_files_ends_with_the_command_that_downloads_them(fetch_weights, capsys):
    assert fetch_weights.main([]) == 0
    assert "vae3d fetch-weights --metrics NAME" in capsys.readouterr().out.splitlines()[-1]


def test_an_interrupted_download_goes_on_where_it_stopped(fetch_weights, serve, places, capsys):
    address, asked = serve(CONTENT, 1000)
    command = ["net.pth", "--dest", str(places[0]), "--mirror", address]
    assert fetch_weights.main(command) == 1
    assert "broke off after 1,000 of 5,120 bytes" in capsys.readouterr().err
    assert fetch_weights.main(command) == 0
    assert asked == [None, "bytes=1000-"]
    assert (places[0] / "net.pth").read_bytes() == CONTENT


@pytest.mark.parametrize(("name", "requests"), [("net.pth", []), ("second.pt", ["bytes=5120-"])])
def test_a_download_stopped_before_its_name_is_only_verified(fetch_weights, serve, places, name, requests):
    """The size of second.pt is not published, so the server must answer that nothing follows."""
    address, asked = serve(CONTENT)
    put(places[0], f"{name}.partial")
    assert fetch_weights.main([name, "--dest", str(places[0]), "--mirror", address]) == 0
    assert asked == requests
    assert (places[0] / name).read_bytes() == CONTENT


def test_a_wrong_file_is_not_kept(fetch_weights, serve, places, capsys):
    address, _ = serve(CONTENT)
    put(places[0], "net.pth.partial", b"x" * 1000)
    assert fetch_weights.main(["net.pth", "--dest", str(places[0]), "--mirror", address]) == 1
    assert f"sha256 {SHA256}" in capsys.readouterr().err
    assert list(places[0].iterdir()) == []


def test_a_file_of_uncertain_hash_is_kept_with_a_warning_and_its_licence(fetch_weights, serve, places, caplog, capsys):
    address, _ = serve(CONTENT)
    assert fetch_weights.main(["--metrics", "ssim", "--dest", str(places[0]), "--mirror", address]) == 0
    assert (places[0] / "unsure.pth").is_file()
    assert OTHER in caplog.text
    captured = capsys.readouterr()
    assert "unsure.pth: not verified" in captured.out
    assert "the licence of unsure.pth is non-commercial" in captured.err


def test_a_fetched_file_is_made_slim_and_the_whole_one_dropped(fetch_weights, serve, places, tmp_path):
    torch.save(trunk(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    fetch_weights.FILES["a.pth"] = WeightFile("a.pth", "", "MIT", ("lpips",), None, digest, slim="features.")
    address, _ = serve(content)
    assert fetch_weights.main(["a.pth", "--slim", "--dest", str(places[0]), "--mirror", address]) == 0
    assert {path.name for path in places[0].iterdir()} == {"a.features.safetensors", "manifest.json"}
    assert fetch_weights.main(["a.pth", "--check", "--dest", str(places[0])]) == 0


def test_an_unreachable_server_and_unknown_names_are_told(fetch_weights, tmp_path, capsys):
    assert fetch_weights.main(["net.pth", "--dest", str(tmp_path), "--mirror", "http://127.0.0.1:9"]) == 1
    with pytest.raises(SystemExit):
        fetch_weights.main(["net.pth", "--dest", str(tmp_path), "--mirror", "a/folder"])
    assert fetch_weights.main(["vgg"]) == 2
    assert "unknown file vgg; use all, net.pth" in capsys.readouterr().err
    assert fetch_weights.main(["--metrics", "psnr", "vmaf"]) == 2
    assert "no weights for vmaf; use psnr, ssim" in capsys.readouterr().err


def test_check_names_every_missing_and_wrong_file(fetch_weights, places, capsys):
    check = ["--check", "--dest", str(places[0])]
    put(places[0], "net.pth", b"other")
    put(places[0], "second.pt")
    assert fetch_weights.main(check) == 1
    captured = capsys.readouterr()
    assert "second.pt: verified" in captured.out
    assert "net.pth is not net.pth (5,120 bytes" in captured.err
    assert "unsure.pth: missing (for ssim)" in captured.err
    assert "not on this machine" not in captured.err


def test_check_is_content_with_an_alternative_and_does_not_write(fetch_weights, places, monkeypatch, capsys):
    monkeypatch.setenv("VAE3D_ALLOW_UNVERIFIED", "1")
    put(places[0], "second.pt")
    assert fetch_weights.main(["--check", "--metrics", "psnr", "--dest", str(places[0])]) == 0
    assert [path.name for path in places[0].iterdir()] == ["second.pt"]
    put(places[0], "second.pt", b"other")
    assert fetch_weights.main(["--check", "--metrics", "psnr", "--dest", str(places[0])]) == 1


@pytest.mark.parametrize(
    ("names", "metrics", "files"),
    [
        ([], ["lpips_vgg"], ["vgg16-397923af.pth"]),
        ([], ["lpips", "flolpips"], ["alexnet-owt-7be5be79.pth", "network-default.pytorch"]),
        ([], ["rfid", "rfvd"], ["weights-inception-2015-12-05-6726825d.pth", "i3d_torchscript.pt"]),
        (["pwc_net.pth.tar"], ["warping_error"], ["raft_large_C_T_SKHT_V2-ff5fadd5.pth", "pwc_net.pth.tar"]),
        (["all"], [], [name for name, file in FILES.items() if not file.alternative_to]),
    ],
)
def test_metrics_choose_the_files(names, metrics, files):
    assert [file.name for file in fetch_weights_command.choose(names, metrics)] == files


def test_the_script_runs_without_site_packages(tmp_path):
    """As on a login node: no torch, no vae3d installed."""
    command = [sys.executable, "-I", "-S", str(tiny.ROOT / "scripts/fetch_weights.py")]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in FILES)
    checked = subprocess.run([*command, "--check", "--dest", "."], capture_output=True, text=True, cwd=tmp_path)
    assert checked.returncode == 1
    assert checked.stderr.count("missing (for") == len([file for file in FILES.values() if not file.alternative_to])
