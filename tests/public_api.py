"""Uses every public function, for `mypy --strict`; see test_api.py."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

import vae3d
from vae3d.metrics import build_metrics


def use(checkpoint: str, source: Path) -> dict[str, float | None]:
    names: list[str] = vae3d.list_models()
    built: vae3d.VideoAutoencoder = vae3d.build(names[0], "model.channels=32")
    model: vae3d.VideoAutoencoder = vae3d.load(checkpoint)
    changed: vae3d.VideoAutoencoder = vae3d.load(Path(checkpoint), part="ema_model", micro_frames=None)
    filled: vae3d.VideoAutoencoder = vae3d.load(checkpoint, built)
    vae3d.save(built, "out", note="mine")
    vae3d.save(changed, Path("wan_vae"), layout="diffusers")
    hub: vae3d.VideoAutoencoder = vae3d.from_pretrained("owner/name", revision="main", filename="vae", token="hf_")
    url: str = vae3d.push_to_hub(hub, "owner/name", private=True, license="mit", message="mine", token="hf_")
    same: vae3d.VideoAutoencoder = vae3d.VideoAutoencoder.from_pretrained("owner/name", token="hf_")
    same.push_to_hub("owner/name", private=True)

    video: vae3d.Video = vae3d.read_video(source, start=1, num_frames=17, height=256, width=256)
    frames: Tensor = video.frames
    rec: Tensor = vae3d.reconstruct(filled, frames, sample=True, seed=1, memory_gib=2.0, progress=True)
    file: Path = vae3d.reconstruct(model, source, "rec.mp4", codec="lossless")
    vae3d.write_video(file, rec, video.fps, codec="lossless")

    codec: vae3d.LatentCodec = vae3d.open_codec(
        checkpoint, pixel_range="unit", precision="bf16", chunk_frames=17, device="cpu", changes={"micro_frames": None}
    )
    z: Tensor = codec.encode(frames, mode="sample")
    decoded: Tensor = codec.decode(z, frames.shape[2])
    latents: Tensor = model.encode(frames).mode()
    again: Tensor = model.decode(latents, frames.shape[2])
    channels: int = model.spec.channels
    normalised: Tensor = model.normalize(latents)
    print(url, channels, normalised, vae3d.score(source, file, build_metrics(["psnr"]), device="cpu"))
    return vae3d.score(decoded, again, ["psnr"])
