#!/usr/bin/env bash
# Loss and perplexity of a checkpoint on its run's validation data, and what it writes:
#
#   scripts/eval_checkpoint.sh CHECKPOINT [PROMPT…]
#
# CHECKPOINT is a run folder, a step folder, or a run's checkpoints/best or checkpoints/latest.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"
use_tools

[[ $# -ge 1 && $1 != -* ]] || usage "name a checkpoint: scripts/eval_checkpoint.sh runs/baseline-d12/checkpoints/best"
[[ -e $1 ]] || die "there is no checkpoint $1; ls runs/*/checkpoints shows what there is"
checkpoint=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
[[ $# -ge 1 ]] || set -- "Once upon a time" "The little dog"
cd "$ROOT" # the run names its data by paths from here
load_env .env

in_environment transformerlm-eval --checkpoint "$checkpoint"
for prompt in "$@"; do
    echo
    in_environment transformerlm-infer --checkpoint "$checkpoint" --prompt "$prompt"
done
