#!/usr/bin/env bash
# Fine-tune the Wan2.1 VAE on panoramas with the options of finetune_vae_rgb.py; see docs/panoramas.md:
#
#   scripts/finetune_wan_erp.sh --vae_path Wan2.1_VAE.pth --data_root DATA --output_dir results/vae_rgb_finetuned \
#     --height 128 --width 256 --max_frames 5 --lr 1e-5 --max_steps 5000 --gradient_checkpointing
#
# runs `vae3d train experiment=wan_erp_rgb ...`, or experiment=wan_erp_decoder with --decoder_only. Options you leave
# out keep the experiment's values. --dry_run prints the command instead of running it; --help prints this. Arguments after
# `--` go to train.py unchanged: `-- launcher=torchrun launcher.nproc=8`. PYTHON names the interpreter.
set -euo pipefail

# option                kind       key of train.py
TABLE='
--vae_path              path       stage.init_from
--data_root             path       data.source.root
--output_dir            folder     run.root/run.name
--resume_from           path       run.resume_from
--height                number     data.height
--width                 number     data.width
--max_frames            frames     data.frames.max
--batch_size            number     data.batch_size
--num_workers           number     data.workers
--lr                    number     optim.lr
--max_steps             number     trainer.max_steps
--warmup_steps          number     optim.warmup_steps
--max_grad_norm         number     optim.grad_clip
--mixed_precision       precision  trainer.precision
--gradient_checkpointing  switch   model.gradient_checkpointing
--save_steps            number     trainer.save_every
--seed                  number     run.seed
--lambda_l1             number     loss.terms.l1.weight
--lambda_edge           number     loss.terms.edge.weight
--lambda_lpips          number     loss.terms.lpips.weight
--lambda_kl             encoder    loss.terms.kl.weight
--lambda_prox           number     optim.proximal
--lpips_warmup_start    number     loss.terms.lpips.ramp[0]
--lpips_warmup_end      number     loss.terms.lpips.ramp[1]
--kl_warmup_start       encoder    loss.terms.kl.ramp[0]
--kl_warmup_end         encoder    loss.terms.kl.ramp[1]
--ema_decay             number     trainer.ema.decay
--encoder_lr_ratio      encoder    stage.train.encoder
--spike_threshold       number     trainer.spike.factor
--decoder_only          switch     experiment
--dry_run               switch     -
'
# Both ends of a ramp are one setting; an end you leave out keeps the step of finetune_vae_rgb.py.
lpips_ramp=(200 500)
kl_ramp=(500 1000)

# Print the comment at the top of this file and the options.
print_help() {
  sed -n '2,/^set /{/^set /d; s/^#$//; s/^# //; p}' "${BASH_SOURCE[0]}"
  printf 'Options:\n'
  awk 'NF { printf "  %-24s %s\n", $1, $3 == "-" ? "print the command, do not run it" : $3 }' <<< "$TABLE"
}

usage_error() {
  printf 'error: %s\n' "$1" >&2
  printf 'options: %s\n' "$(awk 'NF { print $1 }' <<< "$TABLE" | xargs)" >&2
  exit 2
}

quoted() { # a path as a Hydra value, with any characters
  printf "'%s'" "${1//\'/\\\'}"
}

experiment=wan_erp_rgb
dry_run=false
settings=()
encoder_options=()

apply() { # option, kind, key, value
  local option=$1 kind=$2 key=$3 value=$4
  if [[ $kind == encoder ]]; then
    encoder_options+=("$option")
  fi
  if [[ $kind =~ ^(number|encoder|frames)$ && ! $value =~ ^([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$ ]]; then
    usage_error "$option $value is not a number"
  fi
  if [[ $kind =~ ^(path|folder)$ && $value == *\\* ]]; then
    usage_error "$option $value has a backslash, which Hydra reads as an escape"
  fi
  case $option in
    --decoder_only) experiment=wan_erp_decoder ;;
    --dry_run) dry_run=true ;;
    --lpips_warmup_start) lpips_ramp[0]=$value lpips_given=true ;;
    --lpips_warmup_end) lpips_ramp[1]=$value lpips_given=true ;;
    --kl_warmup_start) kl_ramp[0]=$value kl_given=true ;;
    --kl_warmup_end) kl_ramp[1]=$value kl_given=true ;;
    *)
      case $kind in
        path) settings+=("$key=$(quoted "$value")") ;;
        number | encoder) settings+=("$key=$value") ;;
        switch) settings+=("$key=true") ;;
        folder) settings+=("run.root=$(quoted "$(dirname -- "$value")")" "run.name=$(quoted "$(basename -- "$value")")") ;;
        frames)
          [[ $value =~ ^[0-9]+$ && $value -ge 5 ]] || usage_error "$option $value must be a whole number of at least 5"
          settings+=("$key=$(((value - 1) / 4 * 4 + 1))") # clips have 4n + 1 frames
          ;;
        precision)
          case $value in
            bf16 | fp16) settings+=("$key=$value") ;;
            no) settings+=("$key=fp32") ;;
            *) usage_error "$option $value is unknown; use bf16, fp16 or no" ;;
          esac
          ;;
      esac
      ;;
  esac
}

while (($#)); do
  option=$1
  shift
  [[ $option == -- ]] && break
  [[ $option == --help || $option == -h ]] && print_help && exit
  given=""
  if [[ $option == --*=* ]]; then
    given=yes value=${option#*=} option=${option%%=*}
  fi
  read -r kind key < <(awk -v option="$option" '$1 == option { print $2, $3 }' <<< "$TABLE") ||
    usage_error "$option is not an option"
  if [[ $kind == switch ]]; then
    [[ -z $given ]] || usage_error "$option takes no value"
    value=true
  elif [[ -z $given ]]; then
    (($#)) && [[ $1 != --* ]] || usage_error "$option needs a value"
    value=$1
    shift
  fi
  [[ -n $value ]] || usage_error "$option needs a value"
  apply "$option" "$kind" "$key" "$value"
done

if [[ $experiment == wan_erp_decoder && ${#encoder_options[@]} -gt 0 ]]; then
  usage_error "${encoder_options[*]} has no effect with --decoder_only; remove it"
fi
[[ -z ${lpips_given:-} ]] || settings+=("loss.terms.lpips.ramp=[${lpips_ramp[0]},${lpips_ramp[1]}]")
[[ -z ${kl_given:-} ]] || settings+=("loss.terms.kl.ramp=[${kl_ramp[0]},${kl_ramp[1]}]")

train=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/train.py
command=("${PYTHON:-python}" "$train" "experiment=$experiment" ${settings[@]+"${settings[@]}"} "$@")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
