#!/usr/bin/env bash
# Start a training on this host in a tmux session, which outlives the ssh connection:
#
#   scripts/run_train_remote.sh [--sweep LINE]… [--nodes N --node-rank R --rendezvous HOST:PORT] [--] ARGUMENT…
#
# ARGUMENT… are those of transformerlm-train; --resume is added, so that the same command goes on where a run stopped.
# Each --sweep adds a run, one after the other, with the settings in LINE (see scripts/train_session.sh). With --nodes this
# host is one of several that train one model. Credentials and settings are read from .env and env/*.env.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"
use_tools
cd "$ROOT"

main() {
    local words=("$@") sweep=() arguments=() previous
    while [[ $# -gt 0 ]]; do
        case $1 in
            --sweep) sweep+=("$2") && shift 2 ;;
            --nodes | --node-rank | --rendezvous) shift 2 ;;
            --) shift && arguments=("$@") && break ;;
            *) arguments=("$@") && break ;;
        esac
    done
    has tmux || die "tmux is missing on this host; run: just bootstrap-remote"
    case $(session_state) in
        running)
            previous=$(tmux show-environment -t "=$SESSION" TRAIN_COMMAND 2>/dev/null | cut -d = -f 2-) || true
            [[ $previous == "$(quoted ${words[@]+"${words[@]}"} | tr '\n' ' ')" ]] ||
                die "another training runs on this host; watch it with just attach-train, or end it with just kill-train"
            say "this training runs already; watch it with: just attach-train"
            return
            ;;
        ended) tmux kill-session -t "=$SESSION" ;;
    esac
    # In a process of its own: the tmux server keeps the environment that it starts with, and must not keep secrets.
    (
        load_env .env env/*.env
        check_credentials
        sync_dependencies
        check_configurations ${sweep[@]+"${sweep[@]}"}
    )
    forwarded
    tmux new-session -d -s "$SESSION" -x 200 -y 50 -c "$ROOT" \
        env "PATH=$PATH" ${SETTINGS[@]+"${SETTINGS[@]}"} bash scripts/train_session.sh ${words[@]+"${words[@]}"}
    tmux set-environment -t "=$SESSION" TRAIN_COMMAND "$(quoted ${words[@]+"${words[@]}"} | tr '\n' ' ')" 2>/dev/null || true
    tell_early_end
    say "training in the tmux session $SESSION; watch it with: just attach-train"
}

# What is missing (a tokenizer, token files) ends a training at once: told here, with its exit code, while somebody looks.
tell_early_end() {
    local code _
    for _ in 1 2 3 4 5 6; do
        sleep 0.5
        [[ $(session_state) != running ]] || continue
        code=$(tmux list-panes -t "=$SESSION:" -F '#{pane_dead_status}' 2>/dev/null | head -n 1) || true
        last_words 30
        say "the training has ended already, with exit code ${code:=1}"
        exit "$code"
    done
}

# A run that finds no credentials after an hour of preparation helps nobody. Their values are never shown.
check_credentials() {
    case ${WANDB_MODE:-online} in
        offline | disabled | dryrun) return ;;
    esac
    if [[ -n ${WANDB_API_KEY:-} ]]; then
        [[ $WANDB_API_KEY =~ ^[A-Za-z0-9_-]{20,}$ ]] ||
            usage "WANDB_API_KEY does not look like a key; correct env/wandb.env and run: just sync-env"
    elif ! grep -qs 'api\.wandb\.ai' "${NETRC:-$HOME/.netrc}"; then
        usage "no Weights & Biases credentials: copy env/wandb.env.example to env/wandb.env, fill it in and run" \
            "just sync-env; or train without: WANDB_MODE=offline just train"
    fi
}

# A typo is told here, to the terminal of the person who made it, and not in a session that nobody looks at.
check_configurations() {
    local line
    if [[ $# == 0 ]]; then
        check_configuration
    fi
    for line in "$@"; do
        split_words "$line"
        check_configuration ${WORDS[@]+"${WORDS[@]}"}
    done
}

check_configuration() {
    UV_NO_SYNC=1 in_environment python -m cli.train ${arguments[@]+"${arguments[@]}"} "$@" --print-config json >/dev/null
}

main "$@"
