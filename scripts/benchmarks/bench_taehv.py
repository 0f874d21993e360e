"""Measure speed and memory of TAEHV against the published code, with the same weights and input, in turns.

    python scripts/benchmarks/bench_taehv.py --reference taehv/taehv.py      # one CPU thread, fp32; five minutes
    python scripts/benchmarks/bench_taehv.py --reference taehv/taehv.py --variant taew2_2 --size 256 --only decode
    python scripts/benchmarks/bench_taehv.py --reference taehv/taehv.py --device cuda --compile  # streams 720p in fp16

Download the reference, `taehv.py` of madebyollin/taehv, and read it first: it is imported. Outputs must be equal (1e-5
in fp32). CPU times are of this process; ratios are medians over pairs of runs. Memory of a stream is the peak of all
tensors that operators allocate, without weights, counted on fake tensors at two lengths: it must not grow. Frames per
second of a stream are measured with synchronised clocks. Weights are random.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from count_wan_memory import PeakMemory
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vae3d.argparse_types import positive_int
from vae3d.models.taehv import TAEHV, VARIANTS

WORK = ("decode", "encode", "memory", "stream")


def published(file: Path) -> ModuleType:
    """Import the reference."""
    spec = importlib.util.spec_from_file_location("published_taehv", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(variant: str, reference: ModuleType) -> tuple[TAEHV, nn.Module]:
    """Our model and the published one, with the same random weights, scaled so that most pixels are in range."""
    torch.manual_seed(0)
    kind, ours = VARIANTS[variant], TAEHV(variant=variant).eval()
    with torch.no_grad():
        for p in ours.parameters():
            if p.ndim > 1:
                p.normal_(0.0, (1.0 / p[0].numel()) ** 0.5)
        raw, _ = ours.decode_chunk(torch.randn(1, ours.spec.channels, 2, 8, 8), None)
        ours.decoder[-1].weight.mul_(0.4 / raw.std())
    peer = reference.TAEHV(
        None,
        encoder_time_downscale=kind.time_down,
        decoder_time_upscale=kind.time_up,
        patch_size=kind.patch,
        latent_channels=kind.latent_channels,
        arch_variant="super" if kind.decoder == "super" else None,
    )
    peer.load_state_dict(ours.state_dict())
    peer.is_cogvideox, peer.is_h3 = kind.rule == "cogvideox", kind.rule == "h3"
    return ours, peer.eval()


def jobs(work: str, parallel: bool, ours: TAEHV, peer: nn.Module, video: Tensor) -> tuple[Callable, Callable]:
    """The same work by both models. Each returns the published form, which must be equal: NTCHW, pixels in [0, 1]."""
    ours.chunk_latents = None if parallel else 1
    options = {"parallel": parallel, "show_progress_bar": False}
    if work == "encode":
        unit = (video / 2 + 0.5).transpose(1, 2).contiguous()
        return lambda: ours.encode(video).mean.transpose(1, 2), lambda: peer.encode_video(unit, **options)
    z = torch.randn(1, *ours.latent_shape(*video.shape[2:]))
    theirs = z.transpose(1, 2).contiguous()
    return (
        lambda: (ours.decode(z).transpose(1, 2) / 2 + 0.5).clamp_(0, 1),
        lambda: peer.decode_video(theirs, **options),
    )


def on_cpu(work: str, parallel: bool, ours: TAEHV, peer: nn.Module, video: Tensor, repeats: int) -> None:
    mine, theirs = jobs(work, parallel, ours, peer, video)
    a, b = mine(), theirs()
    error = float((a - b).abs().max() / b.abs().max().clamp_min(1))
    if a.shape != b.shape or error > 1e-5:
        sys.exit(f"{work}: outputs of {list(a.shape)} and {list(b.shape)} differ by {error:.1e}")
    times = [(seconds(mine), seconds(theirs)) for _ in range(repeats)]
    ratio = statistics.median(b / a for a, b in times)
    a, b = (1000 * statistics.median(column) / video.shape[2] for column in zip(*times, strict=True))
    form = "parallel" if parallel else "sequential"
    print(f"{work} {form:12} {a:7.1f} {b:7.1f} ms/frame   {ratio:.2f}x   error {error:.0e}", flush=True)


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def our_stream(step: Callable, z: Tensor, chunk: int) -> Iterator[Tensor]:
    memory = None
    for piece in z.split(chunk, 2):
        video, memory = step(piece, memory)
        yield video


def their_stream(reference: ModuleType, peer: nn.Module, z: Tensor) -> Iterator[Tensor]:
    stream = reference.StreamingTAEHV(peer)
    for piece in z.transpose(1, 2).contiguous().unbind(1):
        frame = stream.decode(piece[:, None])
        while frame is not None:
            yield frame
            frame = stream.decode()


def memory_of_stream(variant: str, reference: ModuleType, latents: int, size: int) -> list[float]:
    """Peak MiB while that many latents are decoded one by one: ours, theirs."""
    peaks = []
    for mine in (True, False):
        with FakeTensorMode():
            ours, peer = pair(variant, reference)
            z = torch.zeros(
                1, ours.spec.channels, latents, size // ours.spec.space_stride, size // ours.spec.space_stride
            )
            frames = our_stream(ours.decode_chunk, z, 1) if mine else their_stream(reference, peer, z)
            with PeakMemory([*ours.parameters(), *peer.parameters(), z]) as memory:
                for _ in frames:
                    pass
        peaks.append(memory.peak / 2**20)
    return peaks


def on_stream(args: argparse.Namespace, ours: TAEHV, peer: nn.Module, reference: ModuleType) -> None:
    """Print frames per second of decoding latents chunk by chunk, as a diffusion model gives them."""
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    ours, peer = ours.to(args.device, dtype), peer.to(args.device, dtype)
    stride = ours.spec.space_stride
    size = (args.latents, args.height // stride, args.width // stride)
    z = torch.randn(1, ours.spec.channels, *size, device=args.device, dtype=dtype)
    ways = {
        "published": lambda: their_stream(reference, peer, z),
        "vae3d": lambda: our_stream(ours.decode_chunk, z, args.chunk),
    }
    if args.compile:
        compiled = torch.compile(ours.decode_chunk, dynamic=False)
        ways["vae3d, compiled"] = lambda: our_stream(compiled, z, args.chunk)
    for way, run in ways.items():
        times = [clock(run, args.device) for _ in range(args.repeats + 2)][2:]  # the first two compile and warm up
        rate = args.latents * ours.time_upscale / statistics.median(times)
        print(f"stream {args.height}x{args.width} {way:16} {rate:8.1f} frames/s", flush=True)


def clock(run: Callable[[], Iterator[Tensor]], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in run():
        pass
    wait()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="the published taehv.py")
    parser.add_argument("--variant", choices=[name for name in VARIANTS if name != "taeos1_2"], default="taehv")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=WORK, help="by default all on the CPU, stream on a GPU")
    parser.add_argument("--compile", action="store_true", help="streams: compiled as well")
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--frames", type=positive_int, default=13)
    parser.add_argument("--size", type=positive_int, default=128)
    parser.add_argument("--latents", type=positive_int, default=21, help="length of a stream")
    parser.add_argument("--chunk", type=positive_int, default=1, help="latents at once, of a stream")
    parser.add_argument("--height", type=positive_int, default=720)
    parser.add_argument("--width", type=positive_int, default=1280)
    args = parser.parse_args(argv)
    wanted = args.only or (WORK[:3] if args.device == "cpu" else ("stream",))
    where = torch.cuda.get_device_name() if args.device == "cuda" else "one CPU thread"
    print(f"torch {torch.__version__}, {where}, {args.variant}; vae3d and the published code")
    torch.set_num_threads(1)
    reference = published(args.reference)
    ours, peer = pair(args.variant, reference)
    with torch.inference_mode():
        video = torch.rand(1, 3, args.frames, args.size, args.size) * 2 - 1
        for work in [w for w in ("decode", "encode") if w in wanted]:
            for parallel in (True, False):
                on_cpu(work, parallel, ours, peer, video, args.repeats)
        for latents in (4, 16) if "memory" in wanted else ():
            mine, theirs = memory_of_stream(args.variant, reference, latents, args.size)
            print(f"memory of a stream of {latents:3} latents   {mine:7.1f} {theirs:7.1f} MiB", flush=True)
        if "stream" in wanted:
            on_stream(args, ours, peer, reference)


if __name__ == "__main__":
    main()
