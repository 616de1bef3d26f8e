#!/usr/bin/env bash
# The main job from start to end: a multi-site prostate download becomes an nnU-Net dataset, a method of this package
# and stock nnU-Net train alike, predict sites they have not seen, and are compared there.
#
#   bash scripts/demo.sh                 DeSAM on a generated six-site phantom: one site trains, equal time for both;
#                                        about 12 minutes on 2 cores after installation
#   bash scripts/demo.sh epl             EPL on the same phantom: five sites train, one labelled patient each, equal
#                                        labelled samples for both; about 11 minutes on 2 cores
#   bash scripts/demo.sh equivariant     equivariant CAMs on made brains: slice tags only, then stock nnU-Net on the
#                                        pseudo labels for as long; about 8 minutes on 2 cores
#   bash scripts/demo.sh dcam            D-CAM on made tissue patches of two hospitals: tags of one train both stages, and
#                                        stock nnU-Net on the pseudo labels; the other one is predicted; about 14 minutes
#                                        on 2 cores, which is too short to learn much
#   bash scripts/demo.sh samsdg          SAM-SDG on the six-site phantom: coarse network, then SAM prompted by its boxes, and
#                                        stock nnU-Net for as long as both; about 15 minutes on 2 cores
#   bash scripts/demo.sh study           a small study of the phantom, two methods and two seeds, and its report as a page;
#                                        about 11 minutes on 2 cores
#   bash scripts/demo.sh ... --data DIR  the real download, same steps (SAML layout; equivariant: BraTS 2019; dcam: a folder
#                                        with LUAD-HistoSeg and BCSS-WSSS, which needs a GPU)
#
# Options: --data DIR  --device cpu|cuda (cuda if there is one)  --out DIR (demo_output; others: demo_output_METHOD)
#          desam, samsdg: --source SITE (RUNMC)  |  epl: --target SITE (UCL)  --steps N (100; 5000 with --data)
#          study: --file FILE (studies/demo.yaml)  --jobs N (2), the other options are in FILE
# Killed or stopped? Run it again: finished steps are kept.
set -euo pipefail
cd "$(dirname "$0")/.."

method=desam
case "${1:-}" in desam | epl | equivariant | dcam | samsdg | study) method="$1"; shift ;; esac
data="" site="" steps="" out="" device="" file=studies/demo.yaml jobs=2
while [ $# -gt 0 ]; do
  case "$1 $method" in
    "--file study") file="$2"; shift 2 ;;
    "--jobs study") jobs="$2"; shift 2 ;;
    "--data study" | "--device study") echo "$1: FILE says it (see --help)" >&2; exit 2 ;;
    --data\ *) data="$2"; shift 2 ;;
    "--source desam" | "--source samsdg" | "--target epl") site="$2"; shift 2 ;;
    "--steps epl") steps="$2"; shift 2 ;;
    --out\ *) out="$2"; shift 2 ;;
    --device\ *) device="$2"; shift 2 ;;
    -h\ * | --help\ *) sed -n '2,24p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "Unknown option $1 of the demo of $method (see --help)" >&2; exit 2 ;;
  esac
done
if [ -n "$data" ] && [ ! -d "$data" ]; then echo "--data $data: no such folder" >&2; exit 2; fi
[ -z "$data" ] || data="$(cd "$data" && pwd)"
phantom=nnunet_dgplugins.phantom converter=prostate-saml convert=() protocol=()
case "$method" in
  desam)
    out="${out:-demo_output}" site="${site:-RUNMC}" trainer=DeSAMTrainer id=501
    dataset="Dataset501_ProstateSAML_$site" convert=(--source "$site") ;;
  epl)
    out="${out:-demo_output_epl}" site="${site:-UCL}" trainer=EPLTrainer id=517
    dataset="Dataset517_ProstateSAML_without_$site" convert=(--target "$site" --labelled 1)
    [ -n "$steps" ] || { [ -n "$data" ] && steps=5000 || steps=100; } ;;
  equivariant)
    out="${out:-demo_output_equivariant}" trainer=EquivariantCAMTrainer id=518
    dataset=Dataset518_BraTS2019_T1-T2_tags convert=(--modalities T1,T2 --val 0.1 --test 0.2)
    phantom=nnunet_dgplugins.lesion_phantom converter=brats ;;
  dcam)
    out="${out:-demo_output_dcam}" trainer=DCAMTrainer id=520
    dataset=Dataset520_LUADHistoSeg_4classes_to-BCSS_tags
    phantom=nnunet_dgplugins.histology_phantom converter=luad-histoseg protocol=(--protocol dcam) ;;
  samsdg)
    out="${out:-demo_output_samsdg}" site="${site:-RUNMC}" trainer=SAMSDGTrainer id=522
    dataset="Dataset522_ProstateSAML_$site" convert=(--source "$site") ;;
esac

. scripts/install.sh
started=$SECONDS
spent() { echo "Time after installation: $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. Logs: $1"; }
if [ "$method" = study ]; then
  out="${out:-demo_output_study}"
  dgplugins study "$file" --out "$out" --jobs "$jobs"
  dgplugins report "$out"
  spent "$out/log"
  exit
fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"
export nnUNet_raw="$out/nnUNet_raw" nnUNet_preprocessed="$out/nnUNet_preprocessed" nnUNet_results="$out/nnUNet_results"
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"
# one process: quick for a small set, and every error is seen (nnU-Net's own defaults are for large machines)
export nnUNet_n_proc_DA=0 nnUNet_def_n_proc=1
[ -n "$device" ] || device="$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')"

# the marks of finished steps belong to these options: other options in the same folder are refused, not mixed
options="$method data=$data site=$site steps=$steps device=$device"
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
  if [ "$method" = dcam ]; then # small patches, so that a thin tower sees them often in minutes
    step phantom python -m "$phantom" "$data" --layout luad --size 64 --patches 400 --val 60 --test 0
    step phantom_target python -m "$phantom" "$data" --layout bcss --size 64 --patches 0 --test 80
  else
    step phantom python -m "$phantom" "$data"
  fi
fi
root="$data"
[ "$method" != dcam ] || { root="$data/LUAD-HistoSeg"; convert=(--target "bcss-wsss=$data/BCSS-WSSS"); }
step convert dgplugins convert "$converter" "$root" --id "$id" ${convert[@]+"${convert[@]}"}
# planning splits its work over processes of its own and needs at least one augmentation worker set
plan=(env nnUNet_n_proc_DA=1 nnUNetv2_plan_and_preprocess -c 2d --verify_dataset_integrity -np 2 -npfp 2 --no_pbar)
step plan "${plan[@]}" -d "$id"
images="$nnUNet_raw/$dataset/imagesTs"

settings() { # settings TEXT: how the made images are trained on, unless the user says it
  if [ "$data" = "$out/download" ] && [ -z "${DGPLUGINS_SETTINGS:-}" ]; then
    export DGPLUGINS_SETTINGS="$out/settings.yaml"
    echo "$1" > "$DGPLUGINS_SETTINGS"
  fi
}
minutes_of() { # minutes_of TRAINER...: how long their trainings took together
  python scripts/demo_table.py minutes "${@/#/$nnUNet_results/$dataset/}"
}

second="$id" # dataset of the stock trainer
if [ "$method" = desam ]; then
  # few patients of one scanner: augmented views, and an organ keeps its size in mm (the sites show 137 to 192 mm);
  # 8 epochs of five views instead of the paper's 50 of one; the same in studies/encoders.yaml
  settings "DeSAMTrainer: {epochs: 8, augmented_views: 4, field_of_view: source}"
  step train_desam nnUNetv2_train 501 2d 0 -tr DeSAMTrainer -device "$device"
  equal=(--minutes "$(minutes_of DeSAMTrainer)")
elif [ "$method" = epl ]; then
  equal=(--iterations "$steps")
  # ten times the published rate for few steps, fewer unlabelled patches, and each network learns from labels alone first
  # (an epoch has 25 steps here); as in studies/epl.yaml
  settings "EPLTrainer: {unlabelled_batch_size: 4, initial_lr: 0.001, schedule: poly, cps_start_epoch: 2}"
  step train_epl python -m nnunet_dgplugins.budget 517 2d 0 -tr EPLTrainer "${equal[@]}" -device "$device"
elif [ "$method" = samsdg ]; then
  # the planned network on small images, without ImageNet weights, instead of DeepLabV3 on 512 pixels; eight groupings of
  # slices whose embeddings are kept. Few epochs: after 20 the coarse network knows its own scanner best and others least
  settings "{SAMSDGCoarseTrainer: {network: planned, image_size: 128, epochs: 6, field_of_view: source},
             SAMSDGTrainer: {groupings: 8, epochs: 40, initial_lr: 0.001, box_threshold: 0.5, field_of_view: source}}"
  step train_coarse nnUNetv2_train 522 2d 0 -tr SAMSDGCoarseTrainer -device "$device"
  step train_samsdg nnUNetv2_train 522 2d 0 -tr SAMSDGTrainer -device "$device"
  equal=(--minutes "$(minutes_of SAMSDGCoarseTrainer SAMSDGTrainer)")
elif [ "$method" = dcam ]; then
  # a thin tower and the planned U-Net instead of ResNet-38 and DeepLabV3+; rates of a start without weights. After 40
  # epochs it knows little more than the commonest tags. Small batches for stage 2 and stock nnU-Net: more steps in minutes
  settings "{DCAMClassifierTrainer: {width_divisor: 32, epochs: 150},
             DCAMTrainer: {network: planned, batch_size: 4, epochs: 10}}"
  step train_tags nnUNetv2_train 520 2d 0 -tr DCAMClassifierTrainer -device "$device"
  step train_dcam nnUNetv2_train 520 2d 0 -tr DCAMTrainer -device "$device"
  step pseudo_labels dgplugins pseudo-labels "$nnUNet_results/$dataset/DCAMClassifierTrainer__nnUNetPlans__2d" \
    --out 521 --device "$device"
  step plan_second "${plan[@]}" -d 521
  [ "$data" != "$out/download" ] || step batches dgplugins configure 521 -c 2d --batch-size 4 -o nnUNetPlans
  second=521 equal=(--minutes "$(minutes_of DCAMTrainer)")
else
  # small images and few of them: the prostate's width and a higher rate; how high maps are varies with the terms
  settings "EquivariantCAMTrainer: {width_divisor: 4, initial_lr: 0.001, cmer_reduction: sum, choose_threshold: true}"
  step train_cam nnUNetv2_train 518 2d 0 -tr EquivariantCAMTrainer -device "$device"
  step pseudo_labels dgplugins pseudo-labels "$nnUNet_results/$dataset/EquivariantCAMTrainer__nnUNetPlans__2d" \
    --out 519 --device "$device"
  step plan_second "${plan[@]}" -d 519
  second=519 equal=(--minutes "$(minutes_of EquivariantCAMTrainer)")
fi
step train_stock python -m nnunet_dgplugins.budget "$second" 2d 0 -tr nnUNetTrainer "${equal[@]}" -device "$device"
# without mirroring, for both: a quarter of the time
trainers=("$trainer" nnUNetTrainer)
[ "$method" != dcam ] || trainers=(DCAMClassifierTrainer "${trainers[@]}")
[ "$method" != samsdg ] || trainers=(SAMSDGCoarseTrainer "${trainers[@]}")
for name in "${trainers[@]}"; do
  [ "$name" = nnUNetTrainer ] && of="$second" || of="$id"
  step "predict_$name" nnUNetv2_predict -d "$of" -i "$images" -o "$out/predictions/$name" -c 2d -f 0 \
    -tr "$name" -device "$device" -npp 0 -nps 0 --disable_tta
  step "evaluate_$name" dgplugins evaluate "$id" "$out/predictions/$name" --csv "$out/$name.csv" ${protocol[@]+"${protocol[@]}"}
done
if [ "$method" = samsdg ]; then # four neighbouring slices on a canvas, as in the paper; stock prediction shows one
  step predict_four dgplugins predict -d "$id" -i "$images" -o "$out/predictions/four_slices" -c 2d -f 0 -tr "$trainer" \
    -device "$device"
  step evaluate_four dgplugins evaluate "$id" "$out/predictions/four_slices" --csv "$out/four_slices.csv"
  python scripts/demo_table.py table "$id" "$out" -tr "$trainer" "${equal[@]}" \
    --more "four_slices=SAM-SDG, four slices per canvas" --more "SAMSDGCoarseTrainer=its coarse network alone"
elif [ "$method" = dcam ]; then
  python scripts/demo_table.py patches "$id" "$out" "${equal[@]}"
elif [ "$second" = "$id" ]; then
  python scripts/demo_table.py table "$id" "$out" -tr "$trainer" "${equal[@]}"
else
  python scripts/demo_table.py stages "$id" "$out" "${equal[@]}"
fi
spent "$out/log"
