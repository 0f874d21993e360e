"""Compare a student with its teacher: from configuration to files.

Does what infer does with the student, and also codes the first frames of each file with every encoder and every
decoder; writes the page <save_dir>_compare/index.html and <save_dir>_rec/comparison.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vae3d.commands.infer import build_reconstructor, command_line, reconstruct, set_precision
from vae3d.distributed import init_inference
from vae3d.inference.comparison import Comparer, Network
from vae3d.layout import place
from vae3d.loading import load
from vae3d.metrics import build_metrics
from vae3d.precision import DTYPES, cast_keep_stats

if TYPE_CHECKING:
    from vae3d.config.schema import CompareConfig


def run(config: CompareConfig) -> None:
    ranks, device = init_inference(config.device)
    checkpoint, reconstructor = build_reconstructor(config, device)
    set_precision(config.teacher.precision)
    teacher = cast_keep_stats(place(load(config.teacher.path), device), DTYPES[config.teacher.precision])
    lpips = [name for name in config.metrics if name.startswith("lpips")]
    comparer = Comparer(
        reconstructor,
        {
            "student": Network(reconstructor.model, config.checkpoint, config.precision, autocast=config.precision),
            "teacher": Network(teacher, config.teacher.path, config.teacher.precision),
        },
        build_metrics(["psnr", "ssim", *lpips], device),
        measures=ranks.is_main_process,
    )
    reconstruct(ranks, checkpoint, reconstructor, command_line("compare"), comparer)
