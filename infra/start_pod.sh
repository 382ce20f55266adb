#!/usr/bin/env bash
# What a cloud pod runs (infra/runpod-pod.yaml): text shards where RUN_SHARD=1 asks for them, then the pipeline, which goes on
# where an earlier pod stopped.
#
#   RUN_CONFIG      profile in config/resources, or a file (runpod_2b)
#   RUN_SHARD       1 = shard RUN_DATASET first (0)
#   RUN_DATASET     data set of the hub, file or folder (HuggingFaceFW/fineweb); RUN_DATASET_CONFIG its configuration
#                   (fineweb's sample-10BT)
#   RUN_EXPERIMENT  folder of the shards (fineweb)
#   CLOUD_ROOT      the volume (/workspace)
#   PUBLIC_KEY      of ssh: starts sshd, which lets its owner in
#
# Arguments are handed to transformerlm-pipeline. SIGTERM reaches it, and the run saves.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"
use_tools
cd "$ROOT"
load_env .env env/*.env

cloud_root=${CLOUD_ROOT:-/workspace}
experiment=${RUN_EXPERIMENT:-fineweb}
profile=${RUN_CONFIG:-runpod_2b}
export HF_HOME=${HF_HOME:-$cloud_root/hf_cache}
# To create the root here would fill the disk of a container that forgets it.
[[ -d $cloud_root ]] || die "there is no folder $cloud_root; mount the volume there, or name another by CLOUD_ROOT"
mkdir -p "$cloud_root"/{datasets,artifacts/tokenizer,runs,hf_cache}

if [[ -n ${PUBLIC_KEY:-} ]]; then # of whoever may log in to watch and to fetch; RunPod sets it
    mkdir -p "$HOME/.ssh" /run/sshd
    printf '%s\n' "$PUBLIC_KEY" >"$HOME/.ssh/authorized_keys"
    chmod 700 "$HOME/.ssh" && chmod 600 "$HOME/.ssh/authorized_keys"
    ssh-keygen -A
    "$(command -v sshd || echo /usr/sbin/sshd)"
fi

case ${RUN_SHARD:-0} in
    0) ;;
    1)
        dataset=${RUN_DATASET:-HuggingFaceFW/fineweb} config=${RUN_DATASET_CONFIG:-}
        [[ $dataset != HuggingFaceFW/fineweb ]] || config=${config:-sample-10BT}
        in_environment python scripts/shard_dataset.py --dataset "$dataset" ${config:+--config "$config"} \
            --experiment "$experiment" --root "$cloud_root/datasets"
        ;;
    *) usage "RUN_SHARD is ${RUN_SHARD}; it must be 0 or 1" ;;
esac

command=(transformerlm-pipeline --mode cloud --root "$cloud_root" --profile "$profile"
    --input "$cloud_root/datasets/train/$experiment" --run-dir "$cloud_root/runs/$(basename "$profile" .toml)" "$@")
has uv && command=(uv run "${command[@]}")
exec "${command[@]}"
