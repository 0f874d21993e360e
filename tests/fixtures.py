"""Fixtures of all tests, loaded by conftest.py."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import socketserver
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from fsspec import AbstractFileSystem
from PIL import Image

from tests import compose_cache, tiny
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.config.schema import TrainConfig
from vae3d.data.storage import stores


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all modules and tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One thread, empty caches, a weights folder of random networks, Ctrl-C as in a terminal, and a quick hydra.compose."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", os.fstat)  # each waits 6 ms for a disk, thousands of times; no test cuts the power
    patch.setattr(hydra, "compose", compose_cache.compose)
    for name in list(os.environ):  # of the shell, such as VAE3D_TRACEBACK, HF_HUB_OFFLINE, AWS_PROFILE and http_proxy
        if name.startswith(("VAE3D_", "HF_HUB_", "HF_TOKEN", "AWS_")) or name.lower().endswith("_proxy"):
            patch.delenv(name)
    patch.setenv("VAE3D_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("VAE3D_ALLOW_UNVERIFIED", "1")
    patch.setenv("VAE3D_WEIGHTS", str(tmp_path_factory.mktemp("weights")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered panoramas and depth maps, 32 x 64: three areas of two rooms with six frames."""
    root = tmp_path_factory.mktemp("rooms")
    done = tiny.run(
        *tiny.script("scripts/demo/make_demo_panoramas.py"), str(root), "--depth", "--areas=3", "--rooms=2", "--frames=6",
        "--height=32", cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return root


@pytest.fixture(scope="session")
def trunks(surroundings: None) -> Path:
    """Folder with random VGG and AlexNet features under their official names."""
    import torchvision

    folder = Path(os.environ["VAE3D_WEIGHTS"])
    torch.manual_seed(0)
    for name, file in (("vgg16", "vgg16-397923af.pth"), ("alexnet", "alexnet-owt-7be5be79.pth")):
        with torch.device("meta"):
            features = getattr(torchvision.models, name)(weights=None).features
        state = {f"features.{key}": torch.randn(t.shape) * 0.05 for key, t in features.state_dict().items()}
        torch.save(state, folder / file)
    return folder


@pytest.fixture(scope="session")
def all_weights(trunks: Path) -> Path:
    """The same folder with random weights of every network that metrics use."""
    from torchvision.models import optical_flow

    def shapes(name: str) -> dict:
        return json.loads((Path(__file__).parent / "keys" / name).read_text())

    rng = torch.Generator().manual_seed(0)
    files = {
        "network-default.pytorch": {key: shape for key, (_, shape) in shapes("pwcnet.json").items()},
        "weights-inception-2015-12-05-6726825d.pth": shapes("inception_fid.json"),
        "i3d_pretrained_400.pt": shapes("i3d.json"),
    }
    for file, keys in files.items():
        torch.save({key: _random_weight(key, shape, rng) for key, shape in keys.items()}, trunks / file)
    for name, file in (("raft_large", "raft_large_C_T_SKHT_V2-ff5fadd5"), ("raft_small", "raft_small_C_T_V2-01064c6d")):
        torch.manual_seed(0)
        torch.save(getattr(optical_flow, name)(weights=None).state_dict(), trunks / f"{file}.pth")
    return trunks


def _random_weight(key: str, shape: list[int], rng: torch.Generator) -> torch.Tensor:
    """Random values that keep the scale of activations from layer to layer."""
    if len(shape) > 1:
        return torch.randn(shape, generator=rng) * (2 / math.prod(shape[1:])) ** 0.5
    return torch.full(shape, float(key.endswith(("bn.weight", "running_var"))))


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of ten videos of 12 to 21 frames and two images."""
    folder = tmp_path_factory.mktemp("videos")
    paths = []
    for i in range(10):
        paths.append(f"clip{i}.mp4")
        tiny.write_video(folder / paths[-1], tiny.frames(12 + i, seed=i), g="6", bf="2")
    for i in range(2):
        paths.append(f"image{i}.png")
        Image.fromarray(tiny.frames(1, seed=20 + i)[0]).save(folder / paths[-1])
    pd.DataFrame({"path": paths}).to_csv(folder / "videos.csv", index=False)
    return folder / "videos.csv"


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A table of videos of three aspect ratios, three of each and one of them held out, and one too short."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for number, (name, size) in enumerate([("wide", (36, 64)), ("old", (36, 48)), ("tall", (64, 36))] * 3):
        path = f"{name}{number}.mkv"
        tiny.write_video(folder / path, tiny.frames(4, *size, seed=number), codec="ffv1", pixels="yuv420p")
        rows.append({"path": path, "split": "val" if number < 3 else "train"})
    pd.DataFrame(rows).to_csv(folder / "videos.csv", index=False)
    return folder / "videos.csv"


@pytest.fixture(scope="session")
def mixture(shapes, images) -> TrainConfig:
    """Videos in buckets of three sizes and two frame counts, and images, whose own size is smaller."""
    return tiny.training(
        "spatial", shapes, "data=mixture", "stage=finetune", "stage.init_from=random", "loss=recon_kl",
        f"data.sources.videos.source.path={shapes}", f"data.sources.images.source.path={images}",
        "data.sources.videos.weight=2", "data.sources.images.weight=1", "data.sources.images.batch_size=4",
        "data.sources.images.height=16", "data.sources.images.width=24", "data.height=32", "data.width=32",
        "data.frames.min=1", "data.frames.max=3", "data.sources.videos.buckets.frames=[1,3]",
        "data.sources.videos.buckets.multiple=8", "data.sources.videos.buckets.clips_multiple=2",
        "trainer.max_steps=12", "trainer.save_every=5", "trainer.keep=0", "optim.eps=0.01",
        "validation.every=6", "validation.on_start=false", "validation.frames=3", "validation.clips=3",
    )  # fmt: skip


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in ImageNet's layout: train and val, two classes each, 16 and 4 images."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 2)):
        for index, kind in enumerate(("cat", "train")):  # a class may be called so
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(tiny.frames(1, 40 + i, 48, seed=10 * index + i)[0])
                suffix = ("JPEG", "png", "webp", "jpg")[i % 4]
                picture.save(root / split / kind / f"{i}.{suffix}", quality=95)
    return root


@pytest.fixture(scope="session")
def spatial_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny 2D VAE with random weights, exported."""
    from vae3d.loading import model_config

    folder = tmp_path_factory.mktemp("spatial")
    config = model_config("spatial", *tiny.MODEL["spatial"])
    write_export(Checkpoint(config, tiny.model("spatial").state_dict(), folder, "export"), folder)
    return folder


@pytest.fixture
def clip() -> torch.Tensor:
    """[2, 3, 5, 16, 16] in [-1, 1]."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.uniform(-1, 1, (2, 3, 5, 16, 16))).float()


@pytest.fixture(scope="session")
def s3() -> Iterator[Callable[[str], AbstractFileSystem]]:
    """bucket -> fsspec's file system of an S3 server on this machine, with that bucket."""
    pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socketserver.StreamRequestHandler, "disable_nagle_algorithm", True)  # as in http_server.py
        for name, value in {**settings, "ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(f"AWS_{name}", value)

        def with_bucket(name: str) -> AbstractFileSystem:
            system = stores.file_system(f"s3://{name}")[0]
            system.mkdir(name)
            return system

        yield with_bucket
    server.stop()
