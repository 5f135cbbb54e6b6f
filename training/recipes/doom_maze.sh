#!/usr/bin/env bash
# From nothing to the shipped world model and its any-step variant, from the root of the checkout:
#   training/recipes/doom_maze.sh [OUTPUT]        # hours on two CPU cores with AMX; by default to runs/checkpoints
#   training/recipes/doom_maze.sh --gpu [OUTPUT]  # some 20 minutes on one GPU (H100) with 16 CPU cores
# Started again after an interruption, it goes on where it was: what is complete is skipped.
set -euo pipefail

python=${PYTHON:-python}
gpu=
if [ "${1:-}" = --gpu ]; then
  gpu=yes
  shift
fi
output=${1:-runs/checkpoints}
data=doom-maze-64 latents=latents-doom-maze-64
actions=(noop forward left right forward-left forward-right)
two_processes=(env OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true "$python" -m torch.distributed.run --nproc-per-node 2)
# The C library keeps freed memory, which saves a fifth of the time.
keep_memory=(env GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_TOP_PAD_=268435456
  MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184)
recorders=2 episodes=900
# What replaces lines of the recipes, by recipe.
declare -A instead=()
if [ "$gpu" ]; then
  two_processes=("$python") keep_memory=(env) recorders=$(nproc) episodes=500
  far="--attention sdpa --dataloader-workers 10 --validation-batches 2"
  instead=(
    [autoencoder_doom_maze]="--batch-size 128 --max-train-steps 3600"
    [autoencoder_doom_maze_decoder]="--batch-size 64 --max-train-steps 3000"
    [far_doom_maze]="$far --batch-size 192 --max-minutes 4"
    [far_doom_maze_memory]="$far --batch-size 192 --max-minutes 6 --muon-learning-rate 2.5e-3 --learning-rate 8e-4"
    [far_doom_maze_any_step]="$far --batch-size 64 --max-minutes 1.6"
  )
fi

# step FILE COMMAND...: run the command unless FILE is there, which says that it was completed.
step() {
  local complete=$1
  shift
  if [ -e "$complete" ]; then
    echo "complete: $complete"
    return
  fi
  echo "+ $*"
  "$@"
  touch "$complete"
}

train_autoencoder() { # RECIPE
  step "runs/$1/.complete" "${two_processes[@]}" -m training.train_autoencoder "training/recipes/$1.yaml" \
    --resume-from latest ${instead[$1]:-}
}

train_far() { # RECIPE PROCESSES...
  step "runs/$1/.complete" "${keep_memory[@]}" "${@:2}" -m training.train_far "training/recipes/$1.yaml" \
    --resume-from latest ${instead[$1]:-}
}

make_pipeline() { # NAME RECIPE OPTION...
  step "$output/$1/model_index.json" "$python" -m training.make_pipeline --output "$output/$1" \
    --transformer "runs/$2/ema" --autoencoder runs/autoencoder_doom_maze_decoder/autoencoder \
    --sample-size 64 --action-names "${actions[@]}" --num-training-frames 256 --dtype float16 "${@:3}"
}

join_latents() { # validation is on the walks that come back
  mkdir -p $latents-memory/train/explore $latents-memory/train/revisit $latents-memory/validation
  cp $latents/train/000* $latents/train/001* $latents/train/002[0-4]* $latents-memory/train/explore
  cp $latents-revisit/train/* $latents-memory/train/revisit
  cp $latents-revisit/validation/* $latents-memory/validation
}

step $data/.complete "$python" data/doom_maze.py $data --train "$episodes" --validation 72 --frames 300 --seed 0 --workers "$recorders"
train_autoencoder autoencoder_doom_maze
train_autoencoder autoencoder_doom_maze_decoder
step $latents/.complete "$python" -m training.encode_latents $data --output $latents \
  --autoencoder runs/autoencoder_doom_maze/autoencoder --mixed-precision bf16
train_far far_doom_maze "$python"

# The second stage, for memory: walks that come back, beside the first episodes of the walks above.
step $data-revisit/.complete "$python" data/doom_maze.py $data-revisit --walk revisit --maze-nodes 3 5 \
  --train 160 --validation 48 --frames 300 --seed 0 --workers "$recorders"
step $latents-revisit/.complete "$python" -m training.encode_latents $data-revisit --output $latents-revisit \
  --autoencoder runs/autoencoder_doom_maze/autoencoder --mixed-precision bf16
step $latents-memory/.complete join_latents
train_far far_doom_maze_memory "${two_processes[@]}"
make_pipeline far-doom-maze-64 far_doom_maze_memory --solver UniPC --num-inference-steps 5
train_far far_doom_maze_any_step "$python"
make_pipeline far-doom-maze-64-any-step far_doom_maze_any_step --num-inference-steps 2
