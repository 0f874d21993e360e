"""Images of any size keep it: a 2D VAE of stride 8 gives 65 to 71 pixels back, not 64."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from PIL import Image

from tests import tiny
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.commands import infer
from vae3d.config.issues import ConfigError
from vae3d.config.validate import check_inference
from vae3d.loading import model_config

STRIDE_8 = [*tiny.MODEL["spatial"], "model.channels=[8,8,8,8]"]


@pytest.mark.parametrize("frames", [1, 3])
def test_the_model_gives_back_the_size_it_got(frames):
    model = tiny.model("spatial", *STRIDE_8)
    assert model.spec.space_stride == 8
    for size in range(65, 72):
        video = torch.zeros(1, 3, frames, size, 140 - size)
        with torch.no_grad():
            out = model(video)
        assert out.video.shape == video.shape
        assert out.z.shape[2:] == model.latent_shape(frames, size, 140 - size)[1:] == (frames, 9, -(-(140 - size) // 8))


def test_a_folder_of_images_is_reconstructed_at_their_sizes(tmp_path):
    config = model_config("spatial", *STRIDE_8)
    write_export(Checkpoint(config, tiny.model("spatial", *STRIDE_8).state_dict(), tmp_path, ""), tmp_path / "export")
    (tmp_path / "set").mkdir()
    sizes = [(size, 136 - size) for size in range(65, 72)]
    for height, width in sizes:
        Image.fromarray(tiny.frames(1, height, width)[0]).save(tmp_path / f"set/{height}.png")
    arguments = [f"checkpoint={tmp_path / 'export'}", f"source={tmp_path / 'set'}", f"save_dir={tmp_path / 'out'}"]
    infer.run(check_inference(tiny.compose(*arguments, config="infer")))
    index = pd.read_csv(tmp_path / "out_rec/index.csv")
    assert list(zip(index["height"], index["width"], strict=True)) == sizes
    written = [Image.open(file).size[::-1] for file in sorted((tmp_path / "out_rec").glob("*.png"))]
    assert written == sizes


def test_training_refuses_sizes_that_the_stride_does_not_divide(videos):
    sides = ["data.height=65", "data.width=71", "data.frames.min=1", "data.frames.max=1"]
    with pytest.raises(ConfigError, match=r"data\.height=65: .* 64 or 72(.|\n)*data\.width=71: .* 64 or 72"):
        tiny.training(
            "spatial",
            videos,
            *STRIDE_8,
            *sides,
            "stage=finetune",
            "stage.init_from=random",
            "loss=recon_kl",
            meta_check=True,
        )
