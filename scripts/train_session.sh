#!/usr/bin/env bash
# What runs inside the tmux session that scripts/run_train_remote.sh starts, with the same arguments.
#
# One run, or with --sweep one for each LINE, which holds settings as on a command line. A run of a sweep without a
# run.name of its own gets one made of its settings: `learning_rate-3e-4_depth-6`. One that fails does not keep the next from
# starting; being asked to stop does.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"
use_tools
cd "$ROOT"

EXIT_REQUEUE=75

main() {
    local sweep=() nodes=1 node_rank=0 rendezvous='' code=0 line failed=0 started
    stopping=false
    trap 'stopping=true' TERM USR1
    # What it says last can be read after it has ended.
    [[ -z ${TMUX:-} ]] || tmux set-option -w remain-on-exit on
    while [[ $# -gt 0 ]]; do
        case $1 in
            --sweep) sweep+=("$2") && shift 2 ;;
            --nodes) nodes=$2 && shift 2 ;;
            --node-rank) node_rank=$2 && shift 2 ;;
            --rendezvous) rendezvous=$2 && shift 2 ;;
            --) shift && break ;;
            *) break ;;
        esac
    done
    load_env .env env/*.env
    export UV_NO_SYNC=1 # it was done before, and a run of a sweep must not change the environment of the next
    if [[ ${#sweep[@]} == 0 ]]; then
        started=$(date +%s)
        train "$@" || code=$?
        run_since "$started"
        say "ended with exit code $code${RUN_NAME:+; the log is in runs/$RUN_NAME/log.txt}"
        return $code
    fi
    for line in "${sweep[@]}"; do
        split_words "$line"
        name_run
        code=0
        say "sweep: $line"
        train "$@" ${WORDS[@]+"${WORDS[@]}"} || code=$?
        say "sweep: exit code $code: $line"
        [[ $code == 0 ]] || failed=$((failed + 1))
        if $stopping || [[ $code == "$EXIT_REQUEUE" || $code == 130 ]]; then
            say "sweep: stopped; the same command goes on with it"
            return $code
        fi
    done
    say "sweep: ${#sweep[@]} runs, $failed failed"
    [[ $failed == 0 ]]
}

# train ARGUMENT…: in a process of its own, whose number the session remembers for scripts/stop_train_remote.sh.
train() {
    local command=(python -m cli.train)
    if [[ $nodes != 1 ]]; then
        command=(torchrun --nnodes "$nodes" --nproc-per-node "$(count_gpus)"
            --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "$SESSION"
            --rdzv-conf "is_host=$([[ $node_rank == 0 ]] && echo 1 || echo 0)" -m cli.train)
    fi
    if has uv; then
        command=(uv run "${command[@]}")
    fi
    (
        [[ -z ${TMUX:-} ]] || tmux set-environment TRAIN_PID "$BASHPID"
        exec "${command[@]}" "$@" --resume
    )
}

count_gpus() {
    local count=0
    if has nvidia-smi; then
        count=$(nvidia-smi --list-gpus | wc -l | tr -d ' ')
    fi
    echo $((count > 0 ? count : 1))
}

# Adds a name to the array WORDS, unless one of them gives it.
name_run() {
    local word name=''
    for word in ${WORDS[@]+"${WORDS[@]}"}; do
        case $word in
            run.name=* | --name | --name=*) return ;;
            *=*)
                word=${word%%=*}-${word#*=}
                word=${word##*[a-z_0-9].}
                name+=${name:+_}${word//[^A-Za-z0-9._-]/}
                ;;
        esac
    done
    [[ -z $name ]] || WORDS+=("run.name=$name")
}

main "$@"
