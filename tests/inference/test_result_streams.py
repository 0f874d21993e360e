"""A chunk is decoded while the last one is copied to the host and written: on the CPU, by a stub of streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vae3d
from tests import tiny
from tests.device_stub import DEVICE
from tests.inference.test_infer import read
from tests.stream_stub import StreamStub
from vae3d.commands import infer
from vae3d.config.validate import check_inference
from vae3d.data.media import MediaError
from vae3d.inference import reconstruct
from vae3d.inference.reconstruct import FileResult, Reconstructor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    tiny.write_video(path, tiny.frames(40, 16, 16))
    return path


def reconstructor(export, source, prefix) -> Reconstructor:
    arguments = [f"checkpoint={export}", f"source={source}", f"save_dir={prefix}", "metrics=[psnr]", "sample=true"]
    return infer.build_reconstructor(check_inference(tiny.compose(*arguments, config="infer")), CPU)[1]


def on_stub(found: Reconstructor) -> StreamStub:
    stub, found.device = StreamStub(), DEVICE
    stub.place([*found.model.parameters(), *found.model.buffers()])
    return stub


def files(prefix, kinds=("ori", "rec", "spatial")) -> dict[str, np.ndarray]:
    return {kind: read(prefix.with_name(f"{prefix.name}_{kind}") / "000000_long.mp4") for kind in kinds}


def test_a_chunk_is_queued_before_the_last_is_written(export, long, tmp_path, monkeypatch):
    expected: FileResult = reconstructor(export, long, tmp_path / "cpu").file(str(long), 0)
    found = reconstructor(export, long, tmp_path / "gpu")
    stub, events = on_stub(found), []

    def noted(owner: object, name: str, event: str) -> None:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (events.append(event), call(*args, **kwargs))[1])

    noted(reconstruct, "to_video", "begin")
    noted(stub, "wait", "wait")
    noted(reconstruct, "quantize_unchecked", "decoded")
    noted(reconstruct.VideoWriter, "write", "written")
    with stub.active():
        result = found.file(str(long), 0)
    assert not stub.races, stub.races
    chunks = len(stub.host_waits)  # one for each
    assert chunks >= 3
    read_and_decoded, written = ["begin", "decoded", "decoded"], ["written"] * 3  # kinds of frames
    first = events.index("begin")
    own = [event for event in events[first:] if event != "wait"]
    assert own == [*read_and_decoded, *(read_and_decoded + written) * (chunks - 1), *written]
    text = " ".join(events[first:])
    assert text.count("begin decoded decoded") == chunks  # without waiting for a value; metrics wait, after the writer
    assert text.count("written written written") == chunks
    assert result.result.scores["psnr"].value == pytest.approx(expected.result.scores["psnr"].value, abs=0.01)
    for kind, frames in files(tmp_path / "cpu").items():
        difference = np.abs(frames.astype(int) - files(tmp_path / "gpu")[kind])
        assert difference.max() <= (kind != "ori"), kind  # the stub takes torch apart into other operators


def test_pixels_that_are_not_finite_are_found_on_the_host(export, long, tmp_path, monkeypatch):
    messages = []
    for streams in (False, True):
        found = reconstructor(export, long, tmp_path / f"{streams}")
        open_stream = found.open_stream

        def broken(*args, open_stream=open_stream):
            stream, calls = open_stream(*args), []
            code = type(stream).__call__

            class Broken(type(stream)):
                def __call__(self, video, **settings):
                    out = code(self, video, **settings)
                    calls.append(1)
                    if len(calls) == 2:
                        out.video[0, :, 3, 0, 0] = float("nan")
                    return out

            stream.__class__ = Broken
            return stream

        found.open_stream = broken
        with pytest.raises(MediaError, match="the model's pixels: 3 of") as error:
            if streams:
                with on_stub(found).active():
                    found.file(str(long), 0)
            else:
                found.file(str(long), 0)
        messages.append(str(error.value))
        assert not list(tmp_path.glob(f"{streams}_*/*.mp4"))
    assert messages[0] == messages[1]
    assert "the first in frame" in messages[0]


def test_a_tensor_is_reconstructed_the_same(export, tmp_path):
    model = vae3d.load(export)
    video = torch.rand(1, 3, 20, 16, 16) * 2 - 1
    expected = vae3d.reconstruct(model, video)
    with StreamStub().active() as stub:
        found = vae3d.reconstruct(model, video)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # the stub takes torch apart into other operators
    assert len(stub.host_waits) > 1
