"""Models to and from the Hugging Face hub: a hub on this machine, and the real client against it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vae3d
from tests import tiny
from tests.hub_client import digest
from tests.hub_server import OWNER, READER, Hub
from vae3d.checkpoints.export import write_diffusers, write_final_model
from vae3d.checkpoints.formats import Checkpoint, read_checkpoint
from vae3d.errors import UserError
from vae3d.hub import choose
from vae3d.models.registry import config_of
from vae3d.models.taesd import TAESD


class Client:
    """hub_client in a process. Its HF_HOME is `home`; any other address than the hub's is out of reach."""

    def __init__(self, hub: Hub, home: Path) -> None:
        changes = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        changes |= {"https_proxy": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
        self.log = home / "client.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_client"],
            cwd=tiny.ROOT,
            env=tiny.environ(**changes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
        )

    def __call__(self, function: str, **arguments: Any) -> dict[str, str]:
        self.process.stdin.write(json.dumps([function, arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    vae3d.save(tiny.model("wan"), folder)
    return folder


@pytest.fixture(scope="module")
def weights() -> str:
    return digest(tiny.model("wan").state_dict())


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def client(hub: Hub, home: Path) -> Iterator[Client]:
    client = Client(hub, home)
    yield client
    client.close()


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_model_goes_to_the_hub_with_a_card_and_comes_back_bit_equal(hub, client, saved, weights, home):
    pushed = client("push", source=str(saved), repository="me/mine", license="mit", token=OWNER)
    assert pushed == {"url": f"{hub.url}/me/mine"}
    files = hub.files("me/mine")
    assert set(files) == {".gitattributes", "README.md", "model.safetensors", "model.yaml"}
    assert list(hub.stored.values()) == [files["model.safetensors"]]  # sent as a large file, the others in the commit
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: vae3d\n")
    assert "license: mit" in card
    assert 'vae3d.from_pretrained("me/mine")' in card
    assert client("pull", path="me/mine") == {"weights": weights, "class": "WanVAE"}
    assert list((home / "hub").glob("models--me--mine/snapshots/*/model.safetensors"))
    downloads = list(hub.downloads)
    assert sorted(downloads) == ["me/mine/model.safetensors", "me/mine/model.yaml"]
    assert client("pull", path="me/mine")["weights"] == weights
    assert hub.downloads == downloads  # the second time from the cache


def test_a_repository_needs_an_owner(client, saved):
    assert "owner/name" in client("push", source=str(saved), repository="mine", token=OWNER)["error"]


def test_a_card_that_was_written_by_hand_stays(hub, client, saved):
    hub.commit("me/written", {"README.md": b"by hand"})
    client("push", source=str(saved), repository="me/written", token=OWNER)
    assert hub.files("me/written")["README.md"] == b"by hand"
    assert "model.safetensors" in hub.files("me/written")


def test_a_wrong_token_and_one_that_may_not_write_are_named(hub, client, saved):
    wrong = client("push", source=str(saved), repository="me/new", token="hf_wrong")["error"]
    assert "me/new" in wrong
    assert "token" in wrong
    assert "hf auth login" in wrong
    reading = client("push", source=str(saved), repository="me/new", token=READER)["error"]
    assert "permit" in reading
    assert "write" in reading
    assert "me/new" not in hub.repositories


def test_a_private_repository_needs_a_token(hub, client, saved, weights):
    hub.commit("me/secret", read(saved))
    hub.private.add("me/secret")
    for refused in (client("pull", path="me/secret"), client("pull", path="me/secret", token="hf_wrong")):
        assert "me/secret" in refused["error"]
        assert "token=" in refused["error"]
    assert client("pull", path="me/secret", token=READER)["weights"] == weights


def test_a_revision_is_downloaded_and_a_wrong_one_named(hub, client, saved, weights, tmp_path):
    hub.commit("me/two", read(saved), tag="v1")
    other = tiny.model("wan", seed=1)
    vae3d.save(other, tmp_path / "other")
    newest = hub.commit("me/two", read(tmp_path / "other"))
    assert client("pull", path="me/two", revision="v1")["weights"] == weights
    assert client("pull", path="me/two")["weights"] == digest(other.state_dict())
    assert client("pull", path="me/two", revision=newest)["weights"] == digest(other.state_dict())
    assert "me/two" in client("pull", path="me/two", revision="v3")["error"]
    assert "revision" in client("pull", path="me/two", revision="v3")["error"]


def test_of_a_pipeline_only_the_autoencoder_is_downloaded(hub, client, saved, weights, tmp_path):
    write_diffusers(read_checkpoint(saved), tmp_path / "vae")
    vae = {f"vae/{name}": content for name, content in read(tmp_path / "vae").items()}
    parts = {"model_index.json": b"{}", "README.md": b"", "transformer/config.json": b"{}"}
    large = dict.fromkeys(("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"), b"")
    hub.commit("me/pipeline", parts | large | vae)
    assert client("pull", path="me/pipeline") == {"weights": weights, "class": "WanVAE"}
    downloaded = [name for name in hub.downloads if name.startswith("me/pipeline")]
    assert downloaded == ["me/pipeline/vae/config.json", "me/pipeline/vae/diffusion_pytorch_model.safetensors"]


def test_one_of_several_files_is_named(hub, client, saved, weights):
    files = read(saved)
    hub.commit("me/many", {"a/model.safetensors": b"", "b/model.yaml": files["model.yaml"], "c.pth": b"", "d.pth": b""})
    hub.commit("me/many", {"b/model.safetensors": files["model.safetensors"]})
    several = client("pull", path="me/many")["error"]
    assert "c.pth" in several
    assert "filename=" in several
    assert "/tmp" not in several
    for filename in ("b", "b/model.safetensors"):
        assert client("pull", path="me/many", filename=filename)["weights"] == weights
    assert "nothing" in client("pull", path="me/many", filename="nothing")["error"]
    for outside in ("/etc/passwd", "../../../b/model.safetensors"):
        assert outside in client("pull", path="me/many", filename=outside)["error"]


def test_names_that_no_file_here_can_have_are_passed_over():
    names = ["x" * 300, "a\0b", "../model.safetensors", "/model.safetensors", "model.pth", "model.pth/README.md"]
    assert choose(names, "me/names") == "model.pth"


def test_the_metadata_of_a_final_taehv_comes_along(hub, client, tmp_path):
    model = tiny.model("taehv")
    write_final_model(Checkpoint(config_of(model), model.state_dict(), tmp_path, "export"), tmp_path)
    hub.commit("me/final", {name: (tmp_path / name).read_bytes() for name in ("final_model.pth", "model.json")})
    assert client("pull", path="me/final") == {"weights": digest(model.state_dict()), "class": "TAEHV"}


def test_shards_and_halves_come_with_the_first_file(hub, client, saved, weights, tmp_path):
    write_diffusers(read_checkpoint(saved), tmp_path)
    files = read(tmp_path)
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    names = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    index = {"weight_map": dict.fromkeys(names, shard)}
    hub.commit("me/shards", {"config.json": files["config.json"], shard: files["diffusion_pytorch_model.safetensors"]})
    hub.commit("me/shards", {"diffusion_pytorch_model.safetensors.index.json": json.dumps(index).encode()})
    hub.commit("me/shards", {"onnx/other.bin": b""})
    assert client("pull", path="me/shards") == {"weights": weights, "class": "WanVAE"}
    image_model = tiny.model("taesd")
    for part in ("encoder", "decoder"):
        state = {k.removeprefix(f"{part}."): v for k, v in image_model.state_dict().items() if k.startswith(part)}
        torch.save(state, tmp_path / "half.pth")
        hub.commit("me/halves", {f"taesd_{part}.pth": (tmp_path / "half.pth").read_bytes()})
    assert client("pull", path="me/halves") == {"weights": digest(image_model.state_dict()), "class": "TAESD"}


def test_what_is_no_repository_is_one_error(hub, client):
    for name in ("me/none", "none", "a/b/c.pth"):
        assert name in client("pull", path=name)["error"]


def test_a_hub_that_is_down_or_offline_is_replaced_by_the_cache(hub, client, saved, weights):
    hub.commit("me/cached", read(saved), tag="v1")
    client("pull", path="me/cached")
    client("pull", path="me/cached", revision="v1")
    asked = len(hub.downloads)
    client("offline", on=True)
    try:
        assert client("pull", path="me/cached")["weights"] == weights
        assert client("pull", path="me/cached", revision="v1")["weights"] == weights
        for refused in (client("pull", path="me/none"), client("pull", path="me/cached", revision="v2")):
            assert "HF_HUB_OFFLINE" in refused["error"]
            assert "hf download me/" in refused["error"]
        assert "HF_HUB_OFFLINE" in client("push", source=str(saved), repository="me/x")["error"]
    finally:
        client("offline", on=False)
    hub.is_down = True
    try:
        assert client("pull", path="me/cached")["weights"] == weights
        assert "me/none" in client("pull", path="me/none")["error"]
    finally:
        hub.is_down = False
    assert len(hub.downloads) == asked


def test_a_pipeline_of_which_only_the_autoencoder_is_in_the_cache_is_loaded(hub, client, saved, weights):
    files = {f"vae/{name}": content for name, content in read(saved).items()}
    hub.commit("me/pipeline", {**files, "model_index.json": b"{}", "transformer/model.safetensors": b"large"}, tag="v1")
    client("download", repository="me/pipeline", pattern="vae/*")
    assert client("load", path="me/pipeline")["weights"] == weights
    client("offline", on=True)
    try:
        assert client("pull", path="me/pipeline")["weights"] == weights
    finally:
        client("offline", on=False)


def test_a_folder_here_is_not_looked_up(saved):
    assert isinstance(vae3d.from_pretrained(saved), vae3d.VideoAutoencoder)
    with pytest.raises(UserError, match="WanVAE, not a TAESD"):
        TAESD.from_pretrained(saved)
    with pytest.raises(UserError, match="revision"):
        vae3d.from_pretrained(saved, revision="v1")
