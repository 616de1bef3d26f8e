#!/usr/bin/env bash
# The main job from start to end: a multi-site prostate download becomes an nnU-Net dataset, DeSAM and stock nnU-Net
# train on one site for equal time, predict the five unseen sites and are compared there.
#
#   bash scripts/demo.sh                 a generated six-site phantom, about 12 minutes on 2 cores after installation
#   bash scripts/demo.sh --data DIR      the real download (SAML layout), same steps
#
# Options: --data DIR  --source SITE (RUNMC)  --out DIR (demo_output)  --device cpu|cuda (cuda if there is one)
# Killed or stopped? Run it again: finished steps are kept.
set -euo pipefail
cd "$(dirname "$0")/.."

data="" source_site=RUNMC out=demo_output device=""
while [ $# -gt 0 ]; do
  case "$1" in
    --data) data="$2"; shift 2 ;;
    --source) source_site="$2"; shift 2 ;;
    --out) out="$2"; shift 2 ;;
    --device) device="$2"; shift 2 ;;
    -h | --help) sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "Unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
if [ -n "$data" ] && [ ! -d "$data" ]; then echo "--data $data: no such folder" >&2; exit 2; fi
[ -z "$data" ] || data="$(cd "$data" && pwd)"

. scripts/install.sh
started=$SECONDS
mkdir -p "$out"
out="$(cd "$out" && pwd)"
export nnUNet_raw="$out/nnUNet_raw" nnUNet_preprocessed="$out/nnUNet_preprocessed" nnUNet_results="$out/nnUNet_results"
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"
# one process: quick for a small set, and every error is seen (nnU-Net's own defaults are for large machines)
export nnUNet_n_proc_DA=0 nnUNet_def_n_proc=1
[ -n "$device" ] || device="$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')"

# the marks of finished steps belong to these options: other options in the same folder are refused, not mixed
options="data=$data source=$source_site device=$device"
if [ -e "$out/options" ] && [ "$(cat "$out/options")" != "$options" ]; then
  echo "$out was made with $(cat "$out/options"); now $options. Give another --out, or remove the folder." >&2; exit 2
fi
printf '%s' "$options" > "$out/options"

step() { # step NAME COMMAND...: run once, remember that it ended well
  local name="$1"; shift
  if [ -e "$out/done/$name" ]; then echo "== $name: done before"; return; fi
  echo "== $name: $*"
  mkdir -p "$out/log"
  if ! "$@" > "$out/log/$name.txt" 2>&1; then
    echo "Failed. Last lines of $out/log/$name.txt:" >&2; tail -n 20 "$out/log/$name.txt" >&2; exit 1
  fi
  mkdir -p "$out/done"; : > "$out/done/$name"
}

if [ -z "$data" ]; then
  data="$out/download"
  step phantom python -m nnunet_dgplugins.phantom "$data"
fi
step convert dgplugins convert prostate-saml "$data" --id 501 --source "$source_site"
# planning splits its work over processes of its own and needs at least one augmentation worker set
step plan env nnUNet_n_proc_DA=1 nnUNetv2_plan_and_preprocess -d 501 -c 2d --verify_dataset_integrity -np 2 -npfp 2 --no_pbar
dataset="Dataset501_ProstateSAML_$source_site"
images="$nnUNet_raw/$dataset/imagesTs"

if [ "$data" = "$out/download" ] && [ -z "${DGPLUGINS_SETTINGS:-}" ]; then
  # few patients of one scanner: augmented views, and an organ keeps its size in mm (the sites show 137 to 192 mm);
  # 8 epochs of five views instead of the paper's 50 of one; the same in studies/encoders.yaml
  export DGPLUGINS_SETTINGS="$out/settings.yaml"
  echo "DeSAMTrainer: {epochs: 8, augmented_views: 4, field_of_view: source}" > "$DGPLUGINS_SETTINGS"
fi
step train_desam nnUNetv2_train 501 2d 0 -tr DeSAMTrainer -device "$device"
minutes="$(python scripts/demo_table.py minutes "$nnUNet_results/$dataset/DeSAMTrainer__nnUNetPlans__2d/fold_0")"
step train_stock python -m nnunet_dgplugins.budget 501 2d 0 -tr nnUNetTrainer --minutes "$minutes" -device "$device"
# without mirroring, for both: a quarter of the time
for trainer in DeSAMTrainer nnUNetTrainer; do
  step "predict_$trainer" nnUNetv2_predict -d 501 -i "$images" -o "$out/predictions/$trainer" -c 2d -f 0 \
    -tr "$trainer" -device "$device" -npp 0 -nps 0 --disable_tta
  step "evaluate_$trainer" dgplugins evaluate 501 "$out/predictions/$trainer" --csv "$out/$trainer.csv"
done
python scripts/demo_table.py table 501 "$out" --minutes "$minutes"
echo "Time after installation: $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. Logs: $out/log"
