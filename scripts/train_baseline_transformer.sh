#!/usr/bin/env bash
# Train the baseline Transformer on all GPUs of this machine; a configuration of the caller's takes its place:
#
#   scripts/train_baseline_transformer.sh [table.key=value …] [--config-name=NAME | --config=FILE]
#
# Reads .env (see .env.example); what is set in the environment wins.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"
use_tools
cd "$ROOT"
load_env .env
export WANDB_PROJECT=${WANDB_PROJECT:-transformerlm}

config=(--config-name baseline_transformer)
for argument in "$@"; do
    case $argument in
        --config | --config=* | --config-name | --config-name=* | --config_name | --config_name=*) config=() ;;
    esac
done
in_environment transformerlm-train ${config[@]+"${config[@]}"} "$@"
