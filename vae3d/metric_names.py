"""Names of metrics and presets, for help and messages. Imports no torch, which vae3d.metrics does."""

SUMMARIES = {
    "psnr": "PSNR in dB, of frames and of whole videos",
    "ssim": "structural similarity",
    "ms_ssim": "SSIM on five scales",
    "lpips_alex": "perceptual distance, AlexNet",
    "lpips_vgg": "perceptual distance, VGG",
    "sharpness": "gradient energy over the original's",
    "alpha_psnr": "RGBA: PSNR in dB of alpha",
    "alpha_ssim": "RGBA: structural similarity of alpha",
    "flolpips": "LPIPS weighted by errors of motion, PWC-Net",
    "flolpips_raft_large": "LPIPS weighted by errors of motion, RAFT",
    "flolpips_raft_small": "LPIPS weighted by errors of motion, small RAFT",
    "flicker": "change from frame to frame, and its excess",
    "tpsnr": "PSNR in dB of the change from frame to frame",
    "tof": "error of Farneback's optical flow in pixels",
    "tlp": "error of the perceptual change from frame to frame",
    "warping_error": "error along the original's motion, RAFT",
    "ws_psnr": "panoramas: PSNR weighted by latitude",
    "ws_ssim": "panoramas: SSIM weighted by latitude",
    "seam": "panoramas: errors where left and right edge meet",
    "polar": "panoramas: PSNR of bands of latitude",
    "cube": "panoramas: PSNR of the views ahead, back, left, right, up, down",
    "cube_lpips": "panoramas: LPIPS of these views, AlexNet",
    "rfid": "Fréchet distance of all frames, Inception",
    "rfvd": "Fréchet distance of all videos, I3D",
}
BANDS = {
    **{f"n{low}_{low + 30}": f"{low} to {low + 30} degrees north" for low in (60, 30, 0)},
    **{f"s{low}_{low + 30}": f"{low} to {low + 30} degrees south" for low in (0, 30, 60)},
}
FACES = {
    "": "all six views of a cube",
    "_sides": "the views to the sides",
    "_up": "the view up",
    "_down": "the view down",
}
MOTION = {"": "PWC-Net", "_raft_large": "RAFT", "_raft_small": "small RAFT"}
MEANINGS = {  # column of scores -> what it is, for readers of a page; which values are better is Metric.columns
    "psnr": "Peak signal-to-noise ratio of each frame, over all pixels and colours; mean over frames.",
    "psnr_video": "Peak signal-to-noise ratio over all frames at once, which bad frames lower more than the mean.",
    "ssim": "Structural similarity of small windows, in brightness, contrast and pattern; 1 if frames are equal.",
    "ms_ssim": "Structural similarity on five scales, from fine detail to coarse shapes; 1 if frames are equal.",
    "lpips_alex": "Distance of AlexNet's features, nearer to what people see than PSNR; 0 if frames are equal.",
    "lpips_vgg": "Distance of VGG's features, nearer to what people see than PSNR; 0 if frames are equal.",
    "sharpness": "Gradient energy over the original's: 1 is equally sharp, below is blurred, above is noisy.",
    "alpha_psnr": "Peak signal-to-noise ratio of alpha.",
    "alpha_ssim": "Structural similarity of alpha; 1 if it is equal.",
    **{f"flolpips{k}": f"LPIPS, weighted where motion differs from the original's ({v})." for k, v in MOTION.items()},
    "flicker_ori": "Mean change of the original's pixels to the next frame, of a range of 1; motion is part of it.",
    "flicker_rec": "Mean change of the reconstruction's pixels to the next frame; motion is part of it.",
    "flicker_excess": "How much more the reconstruction changes from frame to frame than the original: 0 is right, "
    "above 0 is flicker, below 0 is frozen texture.",
    "tpsnr": "Peak signal-to-noise ratio of the change from frame to frame: constant errors do not count.",
    "tof": "Mean length of the difference between the optical flows (Farneback) of original and reconstruction.",
    "tlp": "Difference to the original in the perceptual change (LPIPS) from frame to frame, times 100.",
    "warping_error": "Mean square difference of the reconstruction to its next frame, moved back along the original's "
    "motion (RAFT); compare it with the original's own.",
    "warping_error_ori": "The warping error of the original: what noise and wrong flow account for.",
    "ws_psnr": "Peak signal-to-noise ratio of a panorama, rows weighted by their area on the sphere.",
    "ws_ssim": "Structural similarity of a panorama, rows weighted by their area on the sphere; 1 if equal.",
    "seam_gradient": "Mean height of an edge that was added or lost where a panorama's left and right sides meet, of a "
    "range of 1.",
    "seam_ratio": "Error near a panorama's seam over the error elsewhere: near 1 is right, above it the seam is worse.",
    "psnr_polar": "Peak signal-to-noise ratio of a panorama's rows beyond 60 degrees north and south.",
    **{f"psnr_{k}": f"Peak signal-to-noise ratio of a panorama's rows {v}." for k, v in BANDS.items()},
    **{f"cube_psnr{k}": f"Peak signal-to-noise ratio of a panorama, of {v}." for k, v in FACES.items()},
    **{f"cube_lpips{k}": f"Perceptual distance (LPIPS, AlexNet) of a panorama, of {v}." for k, v in FACES.items()},
    "rfid": "Fréchet distance between the sets of original and of reconstructed frames, of Inception's features; it "
    "depends on their number.",
    "rfvd": "Fréchet distance between the sets of original and of reconstructed videos, of I3D's features; it depends "
    "on their number.",
}
UNITS = {"tof": "pixels"}  # of columns that are not in dB and have one


def unit(column: str) -> str:
    """Of a column of scores: dB, pixels or none."""
    return UNITS.get(column, "dB" if "psnr" in column else "")


ALIAS = "lpips"  # stands for the LPIPS that the preset uses

DEFAULT_METRICS = ("ssim", "psnr")
PANORAMA = ("ws_psnr", "ws_ssim", "seam", "polar", "cube", "cube_lpips")  # metrics of panoramas only
PRESET_METRICS = {  # preset -> the metrics that the evaluation computes unless some are named
    **dict.fromkeys(("default", "opensora12", "vidtok", "tokenbench", "torchmetrics", "wfvae"), DEFAULT_METRICS),
    "panorama": ("ws_psnr", "ws_ssim", "seam", "polar", "cube"),
}
