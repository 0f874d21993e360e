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
ALIAS = "lpips"  # stands for the LPIPS that the preset uses

DEFAULT_METRICS = ("ssim", "psnr")
PRESET_METRICS = {  # preset -> the metrics that the evaluation computes unless some are named
    **dict.fromkeys(("default", "opensora12", "vidtok", "tokenbench", "torchmetrics", "wfvae"), DEFAULT_METRICS),
    "panorama": ("ws_psnr", "ws_ssim", "seam", "polar", "cube"),
}
