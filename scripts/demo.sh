#!/usr/bin/env bash
# Install, train toys and write a report: scripts/demo.sh [PART ...], by default clips; all: every part.
#   clips         train a toy video VAE on real clips and photographs, reconstruct, score
#   stages        make small videos, train a toy VAE through the three stages, reconstruct, score
#   gan           train a toy image VAE on photographs, continue with and without a GAN
#   panoramas     train a toy Wan VAE, fine-tune it on rendered rooms with two recipes
#   distillation  distil a toy VAE into a tiny decoder
#   diffusion     train toy diffusion models of images and clips on the latents of toy VAEs
# Everything is written to demo/, and the page demo/report/index.html is updated after each part. Run the script again
# to resume, or delete the folder to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PARTS=(clips stages gan panoramas distillation diffusion)
for part in "$@"; do
  [[ " ${PARTS[*]} all " == *" $part "* ]] || { echo "error: no part $part; give some of ${PARTS[*]}, or all" >&2; exit 2; }
done
[[ " $* " == *" all "* ]] && set -- "${PARTS[@]}"
source scripts/environment.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # more threads only slow down networks this small
# Threads that spin while they wait for each other are ten times slower where another program uses the cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
out=demo/out

run() {
  printf '\n$ %s\n' "$*"
  printf '%s\n' "$*" >> demo/commands/unfinished
  "$@"
}

videos() {
  [[ -f demo/videos/videos.csv ]] || run python scripts/demo/make_demo_videos.py demo/videos
}

clips() { # the last quarter of each clip is held out
  [[ -f demo/clips/clips.csv ]] || run python scripts/demo/make_demo_clips.py demo/clips
  local loss="loss=sd_vae loss.terms.lpips.term.net=alex" metrics=(ssim psnr lpips) # with VGG steps take five times as long
  [[ -f $VAE3D_WEIGHTS/manifest.json ]] || loss="loss=recon_kl" metrics=(ssim psnr)
  run vae3d train experiment=demo_clips_spatial
  run vae3d train experiment=demo_clips stage=stage2 loss=latent_mse \
    stage.init_from.spatial_vae=demo/runs/clips_spatial stage.fit_shortcut=16
  run vae3d train experiment=demo_clips stage=stage3 $loss stage.init_from=demo/runs/clips_stage2 \
    optim.lr=2e-4 trainer.max_steps=40
  for name in clips_stage2 clips_stage3; do
    run vae3d infer checkpoint=demo/runs/$name source=demo/clips/clips.csv split=val height=144 width=176 \
      num_frames=24 save_dir=demo/out/$name overwrite=true
  done
  run vae3d eval --ref $out/clips_stage2_ori --compare stage2=$out/clips_stage2_rec \
    stage3=$out/clips_stage3_rec 2D_VAE=$out/clips_stage3_spatial --device cpu --metric "${metrics[@]}"
}

stages() {
  videos
  run vae3d check-data demo/videos/videos.csv
  run vae3d train experiment=demo_spatial
  run vae3d train experiment=demo stage=stage1 stage.init_from.spatial_vae=demo/runs/spatial
  run vae3d train experiment=demo stage=stage2 stage.init_from=demo/runs/stage1 optim.lr=1e-3 trainer.max_steps=200
  run vae3d train experiment=demo stage=stage3 stage.init_from=demo/runs/stage2 optim.lr=1e-3 trainer.max_steps=300 \
    loss=recon_kl data.frames.max=17
  for stage in spatial stage1 stage2 stage3; do
    run vae3d infer checkpoint=demo/runs/$stage source=demo/videos/videos.csv split=val height=64 width=64 \
      save_dir=demo/out/$stage overwrite=true
  done
  run vae3d eval --ref $out/spatial_ori --compare 2D_VAE=$out/spatial_rec \
    stage1=$out/stage1_rec stage2=$out/stage2_rec stage3=$out/stage3_rec stage3_2D_VAE=$out/stage3_spatial \
    --device cpu --metric ssim psnr tpsnr
}

gan() {
  run python scripts/demo/make_demo_images.py demo/images
  run vae3d train experiment=sd_vae_tiny
  run vae3d train experiment=sd_vae_gan_tiny adversary=none run.name=sd_vae_control
  run vae3d train experiment=sd_vae_gan_tiny
  for name in sd_vae_tiny sd_vae_control sd_vae_gan_tiny; do
    run vae3d infer checkpoint=demo/runs/$name source=demo/images/val height=128 width=128 \
      save_dir=demo/out/$name overwrite=true
  done
  run vae3d eval --ref $out/sd_vae_tiny_ori --compare start=$out/sd_vae_tiny_rec \
    more_steps=$out/sd_vae_control_rec gan=$out/sd_vae_gan_tiny_rec --device cpu --metric ssim psnr sharpness
}

panoramas() { # the Wan VAE has seen ordinary videos only; area0 is held out
  videos
  run python scripts/demo/make_demo_panoramas.py demo/rooms --areas 6 --rooms 5 --frames 6 --height 48
  run vae3d train experiment=wan_tiny
  run vae3d train experiment=wan_erp_tiny
  run vae3d train experiment=wan_erp_tiny_best
  for name in wan_tiny wan_erp_tiny wan_erp_tiny_best; do
    run vae3d infer checkpoint=demo/runs/$name source="'demo/rooms/area0/*/output/panorama_*.png'" \
      save_dir=demo/out/$name overwrite=true
  done
  run vae3d eval --ref $out/wan_tiny_ori --compare start=$out/wan_tiny_rec \
    wan_erp_tiny=$out/wan_erp_tiny_rec wan_erp_tiny_best=$out/wan_erp_tiny_best_rec --device cpu --preset \
    panorama
}

distillation() { # train a teacher and its student, then run every encoder with every decoder
  videos
  run vae3d train experiment=taehv_teacher_tiny
  run vae3d train experiment=taehv_tiny
  run vae3d compare checkpoint=demo/runs/taehv_tiny teacher=demo/runs/taehv_teacher_tiny \
    source=demo/videos/videos.csv split=val height=128 width=128 num_frames=9 save_dir=demo/out/taehv_tiny overwrite=true
}

diffusion() { # each model has its own autoencoder, whose latents are cached
  run python scripts/demo/make_demo_classes.py demo/classes
  run vae3d train experiment=ldm_vae_tiny
  run vae3d encode checkpoint=demo/runs/ldm_vae_tiny source=demo/classes/images.csv \
    cache=demo/latents/classes height=64 width=64 workers=1
  run vae3d latent-stats demo/latents/classes --write demo/runs/ldm_vae_tiny --per_channel
  run vae3d train-diffusion latent_experiment=unet_tiny
  run vae3d sample checkpoint=demo/runs/ldm_unet_tiny out=demo/out/ldm_unet_tiny \
    against=demo/latents/classes count=256 steps=25 guidance=1.5 shift=2 write=[grid] overwrite=true

  videos
  run vae3d train experiment=ldm_video_vae_tiny
  run vae3d encode checkpoint=demo/runs/ldm_video_vae_tiny source=demo/videos/videos.csv \
    cache=demo/latents/videos height=32 width=32 frames=5 clips=all workers=1
  run vae3d latent-stats demo/latents/videos --write demo/runs/ldm_video_vae_tiny
  run vae3d train-diffusion latent_experiment=video_tiny
  run vae3d sample checkpoint=demo/runs/ldm_video_tiny out=demo/out/ldm_video_tiny \
    against=demo/latents/videos count=208 steps=25 guidance=1.5 shift=2 write=[grid] overwrite=true
}

mkdir -p demo/commands
for part in "${@:-clips}"; do
  : > demo/commands/unfinished
  "$part"
  mv demo/commands/unfinished "demo/commands/$part.txt"
  echo
  python scripts/demo/demo_report.py demo
done
