#!/usr/bin/env bash
# What is measured for docs/studies.md, with the bundled pair on its 40 held-out clips: a folder a study, counts alone.
# A run that was stopped goes on. Usage: bash results/cpu/studies/run.sh FOLDER
set -euo pipefail
export OMP_NUM_THREADS=1
study() {
  "${BIN:-.venv/bin}/specvlm" bench quality --untimed --no-report --overlays 0 --out "$OUT/$1" "${@:2}"
}
OUT=$1

study pruners --methods plain,generate,chain,tree,verifier,attention,uniform,random,window,frame \
  --keep-ratios 0.5,0.25,0.1,0.05
for frames in 8 16 32 64; do
  study "frames-$frames" --num-frames "$frames" --methods plain,tree,verifier,uniform,random
done
study lambda --methods plain \
  --method lambda=0.02 mass=0.02 focus=1 --method lambda=0.05 mass=0.05 focus=1 --method lambda=0.1 mass=0.1 focus=1 \
  --method lambda=0.15 mass=0.15 focus=1 --method lambda=0.4 mass=0.4 focus=1 \
  --method focus=0.25 mass=1 focus=0.25 --method focus=0.5 mass=1 focus=0.5 --method focus=0.75 mass=1 focus=0.75
study spacing --methods plain,verifier,uniform --keep-ratios 0.25,0.1,0.05 \
  --method verifier-1d@0.25 spacing=sequence keep_ratio=0.25 --method verifier-1d@0.1 spacing=sequence \
  --method verifier-1d@0.05 spacing=sequence keep_ratio=0.05 \
  --method uniform-1d@0.25 pruner=uniform spacing=sequence keep_ratio=0.25 \
  --method uniform-1d@0.1 pruner=uniform spacing=sequence \
  --method uniform-1d@0.05 pruner=uniform spacing=sequence keep_ratio=0.05
study scoring --methods plain \
  --method rows=text pruner=attention --method rows=last_turn pruner=attention score_rows=last_turn \
  --method rows=last pruner=attention score_rows=last \
  --method layers=0 pruner=attention score_layers=0 --method layers=1 pruner=attention score_layers=1 \
  --method layers=2 pruner=attention score_layers=2 --method layers=3 pruner=attention score_layers=3 \
  --method layers=4 pruner=attention score_layers=4 --method layers=last pruner=attention score_layers=last \
  --method layers=2,3 pruner=attention score_layers=2,3
study positions --methods plain,tree,verifier --keep-ratios 0.5,0.1 \
  --method repacked@1 pruner=none positions=repacked --method repacked@0.5 positions=repacked keep_ratio=0.5 \
  --method repacked@0.1 positions=repacked
