"""Uses every public function, for `mypy --strict`; see test_api.py."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

import vae3d


def use(checkpoint: str, source: Path) -> dict[str, float | None]:
    names: list[str] = vae3d.list_models()
    built: vae3d.VideoAutoencoder = vae3d.build(names[0])
    model: vae3d.VideoAutoencoder = vae3d.load(checkpoint)
    vae3d.save(built, "out")
    hub: vae3d.VideoAutoencoder = vae3d.from_pretrained("owner/name", revision="main")
    url: str = vae3d.push_to_hub(hub, "owner/name", private=True)
    same: vae3d.VideoAutoencoder = vae3d.VideoAutoencoder.from_pretrained(url)
    same.push_to_hub("owner/name")
    video: vae3d.Video = vae3d.read_video(source, num_frames=17)
    frames: Tensor = video.frames
    rec: Tensor = vae3d.reconstruct(model, frames)
    file: Path = vae3d.reconstruct(model, source, "rec.mp4")
    vae3d.write_video(file, rec, video.fps)
    codec: vae3d.LatentCodec = vae3d.open_codec(checkpoint)
    z: Tensor = codec.encode(frames)
    decoded: Tensor = codec.decode(z, frames.shape[2])
    latents: Tensor = model.encode(frames).mode()
    again: Tensor = model.decode(latents, frames.shape[2])
    return vae3d.score(decoded, again, ["psnr"])
