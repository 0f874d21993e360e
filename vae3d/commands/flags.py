"""The flags of commands that import torch, apart from the commands: `--help` and a wrong flag need no torch.

Each function reads the arguments of one command, for the `main` of its module; its docstring is the description that
`--help` prints. `command` is the whole command, for pages.
"""

from __future__ import annotations

import argparse
import inspect
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from vae3d.argparse_types import Parser, byte_size, finite_float, non_negative_int, positive_float, positive_int
from vae3d.metric_names import ALIAS, PRESET_METRICS, SUMMARIES

LAYOUTS = (
    "export",
    "diffusers",
    "qwen_image",
    "ldm",
    "opensora",
    "wan",
    "videox_fun",
    "taehv",
    "taesd",
)  # that convert writes


def _parser(parse: Callable[..., Namespace], epilog: str | None = None) -> Parser:
    name = parse.__name__.removeprefix("parse_").replace("_", "-")
    return Parser(name, description=inspect.cleandoc(parse.__doc__), epilog=epilog)


def parse_try(argv: Sequence[str] | None = None) -> Namespace:
    """Show what a video autoencoder does to a video: vae3d try my.mp4 [CHECKPOINT]

    Writes a folder with a page (index.html): original, reconstruction and error side by side, moving, and scores; and
    both videos as files. Without CHECKPOINT it takes TAEF2, a small autoencoder of single images, and downloads it once
    (5 MB). It reconstructs the first frames of a video, made smaller, so that it takes a minute or two without a GPU.
    """
    parser = _parser(parse_try)
    parser.add_argument("video", help="a video, an image or numbered images (frame_*.png)")
    parser.add_argument(
        "checkpoint", nargs="?", help="a run, an export, published weights, or owner/name on the Hugging Face hub"
    )
    parser.add_argument("--out", type=Path, help="folder; default try_VIDEO or try_VIDEO_CHECKPOINT")
    parser.add_argument("--frames", type=positive_int, default=33, help="first frames to take, default %(default)s")
    parser.add_argument(
        "--height", type=positive_int, default=256, help="reduce higher videos to this, default %(default)s"
    )
    _add_tile_arguments(parser, "code larger frames in tiles of this many pixels, in less memory; --height allows them")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return _with_tiles(parser, argv)


def parse_app(argv: Sequence[str] | None = None) -> Namespace:
    """Try autoencoders on videos in a browser: vae3d app [CHECKPOINT ...]

    Serves a page on this machine: drop a video, or choose one, reconstruct it with one or several checkpoints, see them
    side by side and moving, see the latents, add noise to them, download the results. Without CHECKPOINT it takes
    TAEF2, as vae3d try does. Open the address that it prints; Ctrl-C ends it and deletes its temporary files.

        vae3d app                                      # then drop a video
        vae3d app runs/wan_finetune Wan2.1_VAE.pth --videos clips

    On another machine, do not open the port to a network: ssh -L 8765:localhost:8765 MACHINE, and open the address
    here.
    """
    parser = _parser(parse_app)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="runs, exports, published weights, or owner/name on the Hugging Face hub",
    )
    parser.add_argument(
        "--videos", type=Path, action="append", default=[], metavar="DIR", help="offer the videos and images in DIR"
    )
    _add_tile_arguments(parser, "code larger frames in tiles of this many pixels, in less memory")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--port", type=_port, default=8765, help="default %(default)s; 0: any that is free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at, default %(default)s, this machine only"
    )
    parser.add_argument(
        "--allow_host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which browsers reach the page",
    )
    parser.add_argument(
        "--max_upload", type=positive_float, default=500.0, metavar="MB", help="of a file, default %(default)g"
    )
    parser.add_argument("--max_frames", type=positive_int, default=129, help="of a job, default %(default)s")
    parser.add_argument("--max_height", type=positive_int, default=1080, help="in pixels, default %(default)s")
    parser.add_argument(
        "--max_megapixels", type=positive_float, default=100.0, help="of all frames of a job, default %(default)g"
    )
    parser.add_argument(
        "--read_timeout", type=positive_float, default=60.0, metavar="S", help="for one frame, default %(default)g"
    )
    parser.add_argument(
        "--keep",
        type=positive_float,
        default=60.0,
        metavar="MIN",
        help="for unused uploads and results, default %(default)g",
    )
    return _with_tiles(parser, argv)


def _port(text: str) -> int:
    port = non_negative_int(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give 0 to 65535")
    return port


def parse_index(argv: Sequence[str] | None = None) -> Namespace:
    """Index tar shards, so that every sample of them is one range read; see docs/large_data.md.

        vae3d index "shards/{000000..000999}.tar"
        vae3d index shards --probe
        vae3d index "https://host/shards/{000000..000999}.tar" --out shards.arrow

    Reads the headers of all shards, not the videos. Writes index.arrow beside the shards; of shards at a URL into
    $VAE3D_CACHE/shards, where data=webdataset finds it. The same command resumes; shards that have not changed since
    the last index are not read again. Shards of latents (writers=[webdataset] of vae3d encode) are indexed too.
    """
    parser = _parser(parse_index)
    parser.add_argument(
        "shards", nargs="+", help="tars, patterns ({000000..000999} or *) in quotes, a folder, or URLs of these"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (index.arrow beside the shards)")
    parser.add_argument("--media", metavar="EXT", help="the video or image of a sample, if it has several, such as mp4")
    parser.add_argument(
        "--probe", action="store_true", help="open samples without num_frames, height, width or fps, and store these"
    )
    parser.add_argument("--workers", type=positive_int, help="processes (one per processor)")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".arrow":
        parser.error(f"--out {args.out}: the name of an index ends with .arrow")
    return args


def parse_make_shards(argv: Sequence[str] | None = None) -> Namespace:
    """Write tar shards, in the layout of webdataset, from any source; see docs/large_data.md.

        vae3d make-shards videos.csv shards --size 1GB
        vae3d make-shards photos shards --samples 10000 --shuffle 0 --probe

    A sample has the file as it is (nothing is encoded again) and a .json with its text, label, split, start, end and,
    where they are known, num_frames, height, width and fps. The same source and settings give the same bytes. The same
    command resumes. Writes index.arrow too. Train on the shards with data=webdataset data.source.path=OUT.
    """
    parser = _parser(parse_make_shards)
    parser.add_argument(
        "source", help="a table (.csv, .tsv, .parquet), a list (.json, .jsonl), a folder, a dataset, shards, or a URL"
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", type=byte_size, help="largest size of a shard, such as 500MB (1GB)")
    parser.add_argument("--samples", type=positive_int, help="largest number of samples in a shard")
    parser.add_argument("--shuffle", type=non_negative_int, metavar="SEED", help="write samples in a random order")
    parser.add_argument(
        "--probe", action="store_true", help="read frames, size and rate that are not given from the files"
    )
    parser.add_argument("--root", help="folder of relative paths in a table or list (default: its own)")
    parser.add_argument(
        "--max_broken", type=_share, default=0.0, help="leave out up to this share of files that cannot be read (0)"
    )
    parser.add_argument("--workers", type=positive_int, default=4, help="shards to write at a time (4)")
    args = parser.parse_args(argv)
    if args.size is None and args.samples is None:
        args.size = 10**9
    return args


def _share(text: str) -> float:
    share = finite_float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share, from 0 to below 1")
    return share


def parse_convert(argv: Sequence[str] | None = None) -> Namespace:
    """Convert a checkpoint to the layout of another program; see docs/checkpoints.md.

        vae3d convert runs/opensora_stage3 opensora_folder --to opensora
        vae3d convert sd_vae.safetensors sd_vae_folder --to diffusers --scaling_factor 0.18215
        vae3d convert sd_vae_folder sd_vae.safetensors --to ldm
        vae3d convert runs/opensora_stage3 sdxl_vae --part spatial --to diffusers
        vae3d convert runs/wan_finetune wan_vae.pth --to wan
        vae3d convert lightning.ckpt::ema_model vae --to export --scaling_factor 0.18215

    Reads every checkpoint that vae3d.load reads. If the target layout has no place for the latents' mean and standard
    deviation, they are folded into the weights where that is exact; otherwise the command fails.
    """
    parser = _parser(parse_convert)
    parser.add_argument("source", type=Path, help="file, folder, export or run")
    parser.add_argument("target", type=Path, help="folder to write; for ldm, wan, videox_fun and taehv a file")
    parser.add_argument("--to", required=True, choices=LAYOUTS)
    parser.add_argument("--part", choices=("spatial", "temporal"), help="only this half of an Open-Sora VAE")
    parser.add_argument("--variant", help="TAEHV variant, if the file does not name it")
    parser.add_argument(
        "--scaling_factor", type=positive_float, help="of an image VAE's latents, if the file does not contain it"
    )
    parser.add_argument("--shift_factor", type=finite_float, help="of an image VAE's latents, likewise")
    return parser.parse_args(argv)


def parse_measure_scale(argv: Sequence[str] | None = None) -> Namespace:
    """Measure mean and standard deviation of an autoencoder's latents, and write them into its export.

    See docs/latents.md. vae3d latent-stats does the same from a latent cache.

        vae3d measure-scale runs/sd_vae_gan photos
        vae3d measure-scale runs/wan_finetune videos.csv --frames 17 --height 480 --width 832 --count 200
        vae3d measure-scale sd_vae_folder photos --out sd_vae_measured

    Encodes the centre clip of COUNT files, evenly spread over the source, in fp32, and samples from the posteriors
    (with --of_means it takes their means, for diffusion models that train on them). An image VAE gets one
    scaling_factor, 1 / standard deviation of all values, as Stable Diffusion has it (--shift: also shift_factor, the
    mean; --per_channel: both for each channel). Other models get latents_mean and latents_std for each channel.
    `normalize` then returns latents of unit variance, also in files that vae3d convert writes from the export. Without
    --out the export is rewritten; of a run, the newest.

    --by_pixels sets the deviation of each channel so that equal errors of normalised latents change the decoded pixels
    equally, for losses on latents (stages 1 and 2 of a temporal VAE on top). An image VAE also needs --per_channel.
    """
    parser = _parser(parse_measure_scale)
    parser.add_argument("checkpoint", type=Path, help="run, export, or published weights")
    parser.add_argument("source", help="a CSV, parquet or JSON file, a folder, or one file")
    parser.add_argument("--count", type=positive_int, default=1000, help="use at most this many files (1000)")
    parser.add_argument("--frames", type=positive_int, default=1, help="per clip (1)")
    parser.add_argument("--height", type=positive_int, default=256, help="of the centre crop (256)")
    parser.add_argument("--width", type=positive_int, default=256)
    _add_export_arguments(parser)
    parser.add_argument("--by_pixels", action="store_true", help="scale each channel by its effect on the pixels")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--shift", action="store_true", help="image VAE: also write the mean")
    how.add_argument("--per_channel", action="store_true", help="image VAE: write mean and deviation per channel")
    parser.add_argument("--of_means", action="store_true", help="without the variance of the posteriors")
    parser.add_argument("--out", type=Path, help="write another export instead")


def parse_latent_stats(argv: Sequence[str] | None = None) -> Namespace:
    """Print the statistics of a latent cache, and write its scale into an export; see docs/latents.md.

        vae3d latent-stats latents/photos
        vae3d latent-stats latents/photos --verify
        vae3d latent-stats s3://bucket/latents --partial
        vae3d latent-stats latents/photos --write runs/sd_vae_gan --per_channel
        vae3d latent-stats latents/videos --write Wan2.1_VAE.pth --out wan_measured

    --write gives an image VAE one scaling_factor, 1 / deviation of all values (--shift: also shift_factor, the mean;
    --per_channel: both for each channel). Other models get latents_mean and latents_std for each channel. If the cache
    holds moments, the deviation is that of samples and includes the posteriors' variance; --of_means excludes it, for
    diffusion models that train on means. A cache opened with the export then has the new scale, and so do files that
    vae3d convert writes from it. Without --out the export is rewritten; of a run, the newest.
    """
    parser = _parser(parse_latent_stats)
    parser.add_argument("cache", help="folder of a cache, or tar shards of latents, also at a URL")
    parser.add_argument("--verify", action="store_true", help="compare the hashes of all files of the cache")
    parser.add_argument("--partial", action="store_true", help="of the shards that are encoded so far; writes nothing")
    parser.add_argument("--write", type=Path, metavar="EXPORT", help="run, export, or published weights (with --out)")
    _add_export_arguments(parser)
    args = parser.parse_args(argv)
    if args.partial and (args.write or args.verify):
        parser.error("--partial: neither --write nor --verify; they need the whole cache")
    for name in ("out", "shift", "per_channel", "of_means"):
        if getattr(args, name) and not args.write:
            parser.error(f"--{name} needs --write")
    return args


def parse_encode_status(argv: Sequence[str] | None = None) -> Namespace:
    """Show how much of a latent cache is encoded, and by which processes; see docs/latents.md.

        vae3d encode-status latents/videos

    Exits with status 0 if the cache is complete, 1 if it is not.
    """
    parser = _parser(parse_encode_status)
    parser.add_argument("cache", help="a folder, or the URL of one in a store")
    parser.add_argument(
        "--stale", type=positive_float, default=120.0, help="seconds, as stale= of the encoding processes (120)"
    )
    return parser.parse_args(argv)


def _add_tile_arguments(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--tile", type=positive_int, help=meaning)
    parser.add_argument(
        "--tile_overlap", type=non_negative_int, help="blend tiles over this many pixels; default: exact tiles"
    )


def _with_tiles(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    args = parser.parse_args(argv)
    if args.tile is None and args.tile_overlap is not None:
        parser.error("--tile_overlap needs --tile")
    return args


def parse_probe_latents(argv: Sequence[str] | None = None) -> Namespace:
    """Compare autoencoders by their latents: how easy to diffuse, and how robust the decoders. See docs/latents.md.

        vae3d probe-latents runs/vae_a runs/vae_b --source photos/ --height 256 --width 256 --out probes
        vae3d probe-latents ours=runs/wan_finetune wan=Wan2.1_VAE.pth --source videos.csv --frames 17 \\
            --height 256 --width 256 --count 32 --out probes
        vae3d probe-latents Wan2.1_VAE.pth --source room.mp4 --frames 17 --height 512 --width 512 \\
            --per_file 8 --tile 256 --tile_overlap 64 --out probes

    A model is a path for vae3d.load; NAME= before it distinguishes two of the same file name. Prints a table; writes
    OUT/probes.json and OUT/index.html, which explain each number.
    """
    parser = _parser(parse_probe_latents)
    parser.add_argument("models", nargs="+", metavar="[NAME=]PATH")
    parser.add_argument("--source", required=True, help="folder, table (.csv, .parquet, .json), video or image")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--height", type=positive_int, required=True, help="of a clip, cropped from a file")
    parser.add_argument("--width", type=positive_int, required=True)
    parser.add_argument("--frames", type=positive_int, default=1, help="of a clip; 1 for images (1)")
    parser.add_argument("--count", type=positive_int, default=64, help="use at most this many clips (64)")
    parser.add_argument("--decoded", type=positive_int, default=16, help="how many of them the decoder probes use (16)")
    parser.add_argument("--per_file", type=positive_int, default=1, help="clips per file, at random positions (1)")
    parser.add_argument("--short_side", type=positive_int, help="scale files to this before cropping")
    parser.add_argument("--batch", type=positive_int, default=4, help="clips per forward pass (4)")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    _add_tile_arguments(parser, "also probe coding in tiles of this many pixels")
    parser.add_argument("--device", default="cpu")
    return _with_tiles(parser, argv)


def parse_eval(argv: Sequence[str] | None = None) -> Namespace:
    """Score reconstructed videos against their originals; see docs/score.md.

        vae3d eval --base OUT --metric ssim psnr lpips   # OUT_ori, OUT_rec and OUT_spatial
        vae3d eval --batch_size 2 --real_video_dir OUT_ori --generated_video_dir OUT_rec \\
            --device cuda --sample_fps 24 --crop_size 256 --resolution 256 --num_frames 17 --sample_rate 1 \\
            --metric ssim psnr lpips flolpips --preset opensora12               # Open-Sora's own protocol
        vae3d eval --ref OUT_ori --compare A_rec B_rec   # which is better
        torchrun --nproc_per_node=8 eval/eval_common_metric.py ...              # the same, shared among processes

    Videos are paired by name and decoded once for all metrics. --compare adds confidence intervals. The same command
    resumes after a kill. Nothing is downloaded.
    """
    listing = "\n".join(f"  {name:20} {summary}" for name, summary in SUMMARIES.items())
    panorama = " ".join(PRESET_METRICS["panorama"])
    parser = _parser(parse_eval, epilog=f"metrics:\n{listing}\n  {ALIAS:20} lpips_alex, or what the preset uses")
    add = parser.add_argument_group("what is compared").add_argument
    add("--real_video_dir", "--ref", type=Path, metavar="DIR", help="folder of originals, such as OUT_ori")
    add("--generated_video_dir", "--rec", type=Path, metavar="DIR", help="folder of reconstructions, such as OUT_rec")
    add("--base", metavar="OUT", help="prefix of what vae3d infer wrote: OUT_ori, OUT_rec, OUT_spatial (the ceiling)")
    add(
        "--compare",
        nargs="+",
        metavar="[NAME=]DIR",
        help="several reconstructions of the same originals, and their names in the report",
    )
    add("--pair_by", choices=("stem", "index_csv", "sorted"), default="stem", help="default: equal names")
    add("--allow_unmatched", action="store_true", help="score only files with a counterpart")
    add = parser.add_argument_group("frames and sizes").add_argument
    add("--num_frames", type=positive_int, help="compare the first n frames; default all")
    add("--sample_rate", dest="stride", type=positive_int, default=1, help="take every n-th frame")
    add("--strict_frames", action="store_true", help="error for videos with fewer than --num_frames")
    add("--frames", choices=("equal", "common"), default="equal", help="common: only the frames that both videos have")
    add("--cut", choices=("center", "topleft"), help="crop originals to the size of smaller reconstructions")
    add("--resize", type=_size, metavar="ref|HxW", help="scale reconstructions to the original's, or both to HxW")
    add(
        "--resolution",
        type=positive_int,
        help="scale the short side to this, as Open-Sora does; warns where that enlarges",
    )
    add("--crop_size", dest="crop", type=positive_int, help="centre-crop to this square after scaling; default no crop")
    add("--ignore_fps", action="store_true", help="compare frame by frame although frame rates differ")
    add("--to_8bit", action="store_true", help="score files of more than 8 bits as 8 bits")
    add = parser.add_argument_group("metrics").add_argument
    default = f"default ssim psnr, or with --preset panorama {panorama}"
    add("--metric", nargs="+", metavar="NAME", help=f"see below; {default}")
    add(
        "--preset",
        choices=tuple(PRESET_METRICS),
        default="default",
        help="formulas of a published evaluation; default %(default)s",
    )
    add("--batch_size", type=positive_int, default=1, help="for presets that average over batches")
    add("--rfid_stride", type=positive_int, default=1, help="rfid takes every n-th frame")
    add("--rfvd_frames", type=positive_int, default=16, help="rfvd takes the first n frames; default %(default)s")
    add(
        "--pwc_warp",
        choices=("flolpips", "exact"),
        default="flolpips",
        help="exact: without the published warp's offset",
    )
    add("--on_missing", choices=("stop", "skip"), default="stop", help="skip: leave out metrics without their weights")
    add = parser.add_argument_group("run and report").add_argument
    add("--device", default="cuda", help="cuda or cpu; without a GPU the CPU computes the same numbers")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write, of several with a folder for each; default: RECONSTRUCTIONS_eval",
    )
    add("--fresh", action="store_true", help="discard the scores of earlier runs")
    add("--per_frame", action="store_true", help="also write per_frame.csv")
    add("--no_page", action="store_true", help="no index.html with moving pictures")
    add(
        "--page_videos",
        type=positive_int,
        metavar="N",
        help="show N videos on the page: worst, best, between; default all",
    )
    add("--on_error", choices=("stop", "skip"), default="stop", help="what to do with a pair that cannot be scored")
    add("--sample_fps", type=positive_float, help="ignored, as by Open-Sora's script")
    args = parser.parse_args(argv)
    args.metric = args.metric or PRESET_METRICS[args.preset]
    args.ref, args.recs = _folders(parser, args)
    return args


def _size(text: str) -> str | tuple[int, int]:
    sides = text.split("x")
    if text == "ref":
        return text
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is neither ref nor HEIGHTxWIDTH, such as 256x448")
    return int(sides[0]), int(sides[1])


def _folders(parser: argparse.ArgumentParser, args: Namespace) -> tuple[Path, dict[str, Path]]:
    """The folder of originals, and the folders of reconstructions by their name in the report."""
    if args.base is not None:
        if args.real_video_dir or args.generated_video_dir or args.compare:
            parser.error("--base names all folders; leave out --ref, --rec and --compare")
        spatial = Path(f"{args.base}_spatial")
        recs = {"rec": Path(f"{args.base}_rec")} | ({"spatial": spatial} if spatial.is_dir() else {})
        return Path(f"{args.base}_ori"), recs
    if args.real_video_dir is None or (args.generated_video_dir is None) == (args.compare is None):
        parser.error("give --ref and --rec, --ref and --compare, or --base")
    if args.compare is None:
        return args.real_video_dir, {"rec": args.generated_video_dir}
    named = [_named(text) for text in args.compare]
    for what, values in (("folders", {path for _, path in named}), ("names", {name for name, _ in named})):
        if len(named) < 2 or len(values) < len(named):
            parser.error(f"--compare needs two or more different {what}")
    return args.real_video_dir, dict(named)


def _named(text: str) -> tuple[str, Path]:
    """NAME=DIR, or a folder that is its own name and may have a `=` in it."""
    name, equals, path = text.partition("=")
    if not (name and equals and path) or "/" in name or Path(text).is_dir():
        return text, Path(text)
    return name, Path(path)
