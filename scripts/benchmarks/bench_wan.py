"""Measure speed and memory of the Wan2.1 VAE against diffusers' AutoencoderKLWan, with the same weights and input, in
turns.

    python scripts/benchmarks/bench_wan.py                      # one CPU thread, fp32, small clips; 15 minutes
    python scripts/benchmarks/bench_wan.py --only train32       # one line of it
    python scripts/benchmarks/bench_wan.py --device cuda        # streams 480p and 720p in bf16, eager and compiled

Outputs must be equal first (relative to the largest value, 1e-5 in fp32). CPU times are of this process, which other
programs disturb less than wall time; GPU times are between events. Ratios are medians over pairs of runs. Memory on the
CPU is the peak of all tensors that operators allocate, counted on fake tensors; on a GPU, the allocator's peak. Weights
are random.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vae3d
from vae3d.argparse_types import positive_int
from vae3d.checkpoints.wan import to_diffusers
from vae3d.training.memory import PeakMemory


@dataclass
class Case:
    """work: decode, encode or train. target: least speed-up over diffusers."""

    work: str
    channels: int
    frames: int
    size: int
    target: float


CASES = {
    "decode": Case("decode", 96, 9, 128, 1.4),
    "encode": Case("encode", 96, 9, 128, 1.3),
    "train": Case("train", 96, 17, 64, 1.35),
    "train32": Case("train", 32, 17, 64, 2.5),
}
STREAMS = {"480p": (480, 832), "720p": (720, 1280)}  # height, width


def pair(channels: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Our model and diffusers', with the same random weights."""
    from diffusers import AutoencoderKLWan
    from diffusers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    ours = vae3d.build("wan", f"model.channels={channels}", "model.gradient_checkpointing=false")
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "gamma" in name:
                p.normal_(1.0, 0.1)
            elif p.ndim > 1:
                p.normal_(0.0, 0.6 / p[0].numel() ** 0.5)
    peer = AutoencoderKLWan(base_dim=channels)
    peer.load_state_dict(to_diffusers(ours.state_dict()))
    if device != "cpu":
        ours, peer = ours.to(device, dtype), peer.to(device, dtype)
    return ours, peer.eval()


def jobs(case: Case, ours: nn.Module, peer: nn.Module, video: Tensor) -> tuple[Callable, Callable]:
    """The same work by both models. Their results must be equal."""

    def train(model: nn.Module, code: Callable[[Tensor], Tensor]) -> Tensor:
        model.zero_grad(set_to_none=True)
        (code(video) - video).abs().mean().backward()
        return torch.cat([model.get_parameter(name).grad.flatten() for name in NORMS[type(model).__name__]])

    if case.work == "train":
        return (
            lambda: train(ours, lambda x: ours.decode(ours.encode(x).mean).clamp(-1, 1)),  # as diffusers does
            lambda: train(peer, lambda x: peer.decode(peer.encode(x).latent_dist.mean).sample),
        )
    if case.work == "encode":
        return lambda: ours.encode(video).mean, lambda: peer.encode(video).latent_dist.mean
    with torch.no_grad():
        z = ours.encode(video).mean
    return lambda: ours.decode(z).clamp(-1, 1), lambda: peer.decode(z).sample


# The first norm of the encoder and the last of the decoder: their gradients pass through all layers.
NORMS = {
    "WanVAE": ("encoder.downsamples.0.residual.0.gamma", "decoder.head.0.gamma"),
    "AutoencoderKLWan": ("encoder.down_blocks.0.norm1.gamma", "decoder.norm_out.gamma"),
}


def on_cpu(name: str, case: Case, repeats: int) -> None:
    ours, peer = pair(case.channels)
    video = torch.rand(1, 3, case.frames, case.size, case.size) * 2 - 1
    with torch.set_grad_enabled(case.work == "train"):
        mine, theirs = jobs(case, ours, peer, video)
        a, b = mine(), theirs()
        error = float((a - b).abs().max() / b.abs().max())
        allowed = 1e-3 if case.work == "train" else 1e-5  # L1's gradient is a sign, which rounding may flip
        if error > allowed:
            sys.exit(f"{name}: outputs differ by {error:.1e}")
        times = [(seconds(mine), seconds(theirs)) for _ in range(repeats)]
    ratio = statistics.median(b / a for a, b in times)
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    memory = [peak(case, side) / 2**20 for side in (0, 1)]
    print(
        f"{name:8} {case.channels:3} channels {case.frames:2} x {case.size}^2   {a:7.2f} s {b:7.2f} s   "
        f"{ratio:.2f}x (target {case.target}x)   {memory[0]:6.0f} {memory[1]:6.0f} MiB ({memory[0] / memory[1]:.2f}x)"
        f"   error {error:.0e}",
        flush=True,
    )


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def peak(case: Case, side: int) -> int:
    """Peak bytes; side 0 is ours, 1 is diffusers'."""
    with FakeTensorMode(), torch.set_grad_enabled(case.work == "train"):
        models = pair(case.channels)
        video = torch.zeros(1, 3, case.frames, case.size, case.size)
        job = jobs(case, *models, video)[side]
        apart = [p for model in models for p in model.parameters()]
        with PeakMemory([*apart, video]) as memory:
            job()
    return memory.peak


@torch.inference_mode()
def on_gpu(name: str, latents: int, chunk: int, repeats: int) -> None:
    """Decode a stream in chunks with diffusers, ours and ours compiled; print how far the last two differ."""
    height, width = STREAMS[name]
    ours, peer = pair(96, "cuda", torch.bfloat16)
    z = torch.randn(1, 16, latents, height // 8, width // 8, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(ours.decode_chunk, dynamic=False)

    def stream(step: Callable) -> Tensor:
        frames, cache = [], None
        for piece in z.split([1] + [chunk] * ((latents - 1) // chunk), 2):
            video, cache = step(piece, cache)
            frames.append(video[:, :, -1, ::16, ::16].float())  # a sample: the whole would count as memory
        return torch.stack(frames)

    ways = {
        "diffusers": lambda: peer.decode(z).sample,
        "vae3d": lambda: stream(ours.decode_chunk),
        "vae3d, compiled": lambda: stream(compiled),
    }
    frames = 1 + 4 * (latents - 1)
    reference = None
    for way, run in ways.items():
        out = run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        memory = (torch.cuda.max_memory_allocated() - before) / 2**30
        error = ""
        if way != "diffusers":
            reference = out if reference is None else reference
            error = f"   differs from eager by {float((out - reference).abs().max()):.1e}"
        print(
            f"{name} {way:16} {frames / statistics.median(times):7.2f} frames/s   {memory:6.2f} GiB{error}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=(*CASES, *STREAMS), help="only these lines")
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument(
        "--latents", type=positive_int, default=21, help="length of a stream on a GPU (21 latents, 81 frames)"
    )
    parser.add_argument("--chunk", type=positive_int, default=2, help="latents per chunk of a stream on a GPU")
    args = parser.parse_args()
    where = platform.processor() or platform.machine()
    if args.device == "cuda":
        where = f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    print(f"torch {torch.__version__}, {where}")
    if args.device == "cpu":
        torch.set_num_threads(1)
        print(f"{'':41}{'vae3d':>7}   {'diffusers':>9}   {'faster':22} {'memory, vae3d and diffusers':>24}")
        for name in [n for n in CASES if not args.only or n in args.only]:
            on_cpu(name, CASES[name], args.repeats)
    else:
        for name in [n for n in STREAMS if not args.only or n in args.only]:
            on_gpu(name, args.latents, args.chunk, args.repeats)


if __name__ == "__main__":
    main()
