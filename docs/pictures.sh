#!/usr/bin/env bash
# Draws the pictures of README.md and docs/commands.md with the bundled model. Run it where `ddpm` is installed.
set -euo pipefail
cd "$(dirname "$0")"
model=bundled:digits
digits=$(mktemp -d)
python3 -m zipfile -e ../examples/digits.zip "$digits"
real() { find "$digits/$1" -name '*.png' | sort | sed -n "$2p"; }

ddpm sample -m $model -o digits.png --force
ddpm denoise-trace -m $model --n 4 --steps 50 --frames 26 --scale 3 -o denoising.gif --force
ddpm denoise-trace "$(real 3 7)" -m $model --t 300 -o trace.png --force
ddpm interpolate "$(real 4 1)" "$(real 8 1)" -m $model --t 250,500,750 -o interpolation.png --force
rm -r "$digits"
