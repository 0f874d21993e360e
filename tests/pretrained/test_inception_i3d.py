from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import tiny
from vae3d.pretrained.i3d import I3D, KINETICS, MaxPool, _pad_same, batch_norm_eps, load_i3d, preprocess
from vae3d.pretrained.inception import FILE, InceptionV3, TensorFlowPooling, resize_tf1
from vae3d.pretrained.weights import FILES, WeightsMissing, sha256

INCEPTION_KEYS = json.loads((tiny.ROOT / "tests/keys/inception_fid.json").read_text())
I3D_KEYS = json.loads((tiny.ROOT / "tests/keys/i3d.json").read_text())

# Of torch-fidelity's and VideoGPT's networks with the weights of `random_state`, on the inputs of the tests.
INCEPTION_FEATURES = [[0.0, 0.0133, 5.9003, 2.4508], [0.0, 0.0858, 5.1455, 2.3533]]
I3D_FEATURES = [5.9745, -1.8666, 3.6575, -3.3291, -5.7637, -4.3488, 4.092, 3.6905]


def random_state(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights that keep the scale of activations, without num_batches_tracked, as in VideoGPT's file."""
    rng = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        if key.endswith(("bn.weight", "running_var")):
            state[key] = torch.rand(shape, generator=rng) + 0.5
        elif not key.endswith("num_batches_tracked"):
            scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
            state[key] = torch.randn(shape, generator=rng) * scale
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights under the published names."""
    folder = tmp_path_factory.mktemp("networks")
    torch.save(random_state(INCEPTION_KEYS), folder / FILE)
    torch.save(random_state(I3D_KEYS), folder / "i3d_pretrained_400.pt")
    return folder


@pytest.fixture(scope="module")
def inception(folder) -> InceptionV3:
    return InceptionV3().load(folder / FILE)


@pytest.fixture(scope="module")
def i3d(folder) -> nn.Module:
    return load_i3d(folder / "i3d_pretrained_400.pt")


class Script(nn.Module):
    """The published TorchScript's signature; its logits are 400 times the mean."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        return x.mean((1, 2, 3, 4))[:, None].expand(-1, 400)


def save_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Script()), path)


def shapes(network: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in network.state_dict().items()}


def test_inception_has_the_published_keys_but_no_classifier():
    assert shapes(InceptionV3().network) == {k: v for k, v in INCEPTION_KEYS.items() if not k.startswith("fc.")}


def test_i3d_has_the_published_keys():
    assert shapes(I3D(eps=1e-3)) == I3D_KEYS


@pytest.mark.parametrize("name", ["inception", "i3d"])
def test_a_loaded_network_is_whole_and_frozen(request, name):
    network = request.getfixturevalue(name)
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert {t.device.type for t in network.state_dict().values()} == {"cpu"}


def image() -> Tensor:
    """[2, 3, 40, 30] of 8 bits: a pattern and its mirror image."""
    rows, columns = torch.arange(40)[:, None], torch.arange(30)[None]
    frame = torch.stack([(rows * a + columns * b) % 256 for a, b in ((7, 0), (0, 11), (5, 3))]).float() / 255
    return torch.stack([frame, frame.flip(-1)])


def test_inception_gives_the_features_of_torch_fidelity(inception):
    features = inception(image())
    assert features.shape == (2, 2048)
    expected = torch.tensor(INCEPTION_FEATURES)
    torch.testing.assert_close(features[:, ::512], expected, rtol=1e-3, atol=1e-3)


def test_inception_sees_8_bits(inception):
    frames = image()[:1]
    assert torch.equal(inception(frames + 0.4 / 255), inception(frames))


@pytest.mark.parametrize(("kind", "corner"), [("average", (0 + 1 + 3 + 4) / 4), ("max", 4)])
def test_inceptions_averages_leave_out_the_padding_and_its_last_block_pools_by_maximum(kind, corner):
    with TensorFlowPooling(kind):
        pooled = F.avg_pool2d(torch.arange(9.0).view(1, 1, 3, 3), kernel_size=3, stride=1, padding=1)
    assert pooled[0, 0, 0, 0] == corner


def test_resize_samples_from_the_corner_and_repeats_the_last_sample():
    x = torch.tensor([[0.0, 10.0], [20.0, 30.0]])
    enlarged = torch.tensor([[0.0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]])
    assert torch.equal(resize_tf1(x, 4), enlarged)
    assert torch.equal(resize_tf1(enlarged, 2), x)  # every second sample: no antialiasing


def test_i3d_gives_the_logits_of_videogpt(i3d):
    time = torch.arange(10).view(1, 1, 10, 1, 1)
    video = (image()[:1, :, None] + time / 20).remainder(1.0)
    features = i3d.features(video)
    assert features.shape == (1, 400)
    torch.testing.assert_close(features[0, ::50], torch.tensor(I3D_FEATURES), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(224, 7, 2, (2, 3)), (9, 7, 2, (3, 3)), (5, 3, 1, (1, 1)), (4, 2, 2, (0, 0))],
)
def test_same_padding_puts_an_odd_zero_behind(size, kernel, stride, padding):
    padded = _pad_same(torch.ones(1, 1, 1, 1, size), (1, 1, kernel), (1, 1, stride)).flatten()
    before, after = padding
    assert padded.tolist() == [0.0] * before + [1.0] * size + [0.0] * after


def test_same_pooling_keeps_an_incomplete_last_window():
    x = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert MaxPool((2, 1, 1), (2, 1, 1))(x).flatten().tolist() == [1, 3, 4]


def test_preprocessing_crops_the_centre_to_minus_one_to_one():
    video = (torch.arange(448.0) / 447).expand(2, 3, 1, 224, 448)
    prepared = preprocess(video)
    assert prepared.shape == (2, 3, 1, 224, 224)
    torch.testing.assert_close(prepared[0, 0, 0, 0], torch.arange(112.0, 336.0) / 447 * 2 - 1)


@pytest.mark.parametrize("size", [(100, 150), (150, 100), (400, 400), (1, 7)])
def test_preprocessing_is_bilinear_to_a_shorter_side_of_224(size):
    video = torch.rand(1, 3, 2, *size)
    scale = 224 / min(size)
    height, width = (224, math.ceil(size[1] * scale)) if size[0] < size[1] else (math.ceil(size[0] * scale), 224)
    frames = nn.functional.interpolate(video[0].transpose(0, 1), size=(height, width), mode="bilinear")
    top, left = (height - 224) // 2, (width - 224) // 2
    expected = frames[:, :, top : top + 224, left : left + 224].transpose(0, 1) * 2 - 1
    torch.testing.assert_close(preprocess(video)[0], expected)


def test_short_and_malformed_videos_are_refused(i3d):
    for shape in ((1, 3, 9, 32, 32), (3, 10, 32, 32), (1, 10, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"I3D needs \[B, 3, T, H, W\] with T of at least 10; this is \[") as error:
            i3d.features(torch.zeros(shape))
        assert str(list(shape)) in str(error.value)


def test_deepminds_file_is_known_by_its_content(tmp_path, monkeypatch):
    """Its batch norms have another eps than VideoGPT's."""
    file, other = tmp_path / "renamed.safetensors", tmp_path / "other.safetensors"
    file.write_bytes(b"weights")
    other.write_bytes(b"others")
    monkeypatch.setitem(FILES, KINETICS, replace(FILES[KINETICS], sha256=sha256(file)))
    assert (batch_norm_eps(file), batch_norm_eps(other), batch_norm_eps(tmp_path / KINETICS)) == (1e-3, 1e-5, 1e-3)


def test_a_torchscript_file_is_run_without_its_own_preprocessing_and_without_warnings(tmp_path):
    save_script(tmp_path / "script.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = load_i3d(tmp_path / "script.pt")
    video = torch.rand(2, 3, 10, 30, 40)
    features = network.features(video)
    assert features.shape == (2, 400)
    torch.testing.assert_close(features[:, 0], preprocess(video).mean((1, 2, 3, 4)))


def test_the_torchscript_file_is_preferred(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "i3d_pretrained_400.pt").symlink_to(folder / "i3d_pretrained_400.pt")
    assert isinstance(load_i3d(), I3D)
    save_script(tmp_path / "i3d_torchscript.pt")
    assert not isinstance(load_i3d(), I3D)


def test_code_of_another_hash_is_not_run_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.delenv("VAE3D_ALLOW_UNVERIFIED")
    save_script(tmp_path / "renamed.pt")
    with pytest.raises(WeightsMissing, match=r"renamed\.pt is not i3d_torchscript\.pt"):
        load_i3d(tmp_path / "renamed.pt")


def test_missing_weights_name_both_files(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(WeightsMissing, match=r"(?s)i3d_torchscript\.pt.*i3d_pretrained_400\.pt"):
        load_i3d()


def test_another_networks_file_is_refused_with_the_first_missing_keys(folder):
    with pytest.raises(
        WeightsMissing, match=r"i3d_pretrained_400\.pt does not hold the weights of InceptionV3: "
    ) as error:
        InceptionV3().load(folder / "i3d_pretrained_400.pt")
    assert "Conv2d_1a_3x3.conv.weight is missing; Conv2d_1a_3x3.bn.weight is missing" in str(error.value)
    with pytest.raises(WeightsMissing, match=r"weights of I3D: Conv3d_1a_7x7\.conv3d\.weight is missing"):
        load_i3d(folder / FILE)


def test_a_tensor_of_another_shape_is_named(tmp_path, folder):
    state = torch.load(folder / "i3d_pretrained_400.pt", weights_only=True)
    state["logits.conv3d.bias"] = torch.zeros(600)
    torch.save(state, tmp_path / "i3d_600.pt")
    with pytest.raises(WeightsMissing, match=r"i3d_600\.pt .* logits\.conv3d\.bias has shape \[600\], not \[400\]$"):
        load_i3d(tmp_path / "i3d_600.pt")


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript archive")
@pytest.mark.parametrize(
    ("content", "named"),
    [("text", "web page"), ("script", "TorchScript"), ("list", "does not hold the weights"), ("nothing", "empty")],
)
def test_a_file_without_weights_is_refused(tmp_path, content, named):
    path = tmp_path / "file.pth"
    if content == "script":
        save_script(path)
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_text("<html>" if content == "text" else "")
    with pytest.raises(WeightsMissing, match=rf"file\.pth.* {named}"):
        InceptionV3().load(path)
