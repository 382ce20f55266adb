#!/usr/bin/env bash
# End the training session of this host, after the run has saved:
#
#   scripts/stop_train_remote.sh [SECONDS]
#
# Asks with SIGTERM, waits up to SECONDS (600) for the run to save and leave, then ends the session. Where that is not
# enough, it says so and leaves the run alone.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"
use_tools
cd "$ROOT"

seconds=${1:-600}
if [[ $(session_state) == none ]]; then
    say "no training session on this host"
    exit
fi
if [[ $(session_state) == running ]]; then
    pid=$(tmux show-environment -t "=$SESSION" TRAIN_PID 2>/dev/null | cut -d = -f 2) || true
    say "asked the run to save (SIGTERM); waiting for it, up to $seconds seconds"
    # The session first: a sweep then starts no other run when this one has left.
    kill -TERM "$(tmux list-panes -t "=$SESSION:" -F '#{pane_pid}')" ${pid:+"$pid"} 2>/dev/null || true
    for ((waited = 0; waited < seconds; waited++)); do
        [[ $(session_state) == running ]] || break
        sleep 1
    done
    if [[ $(session_state) == running ]]; then
        run_since "$(tmux display-message -p -t "=$SESSION:" '#{session_created}')"
        [[ $RUN_STATE != preempted ]] ||
            die "$RUN_NAME has saved (step $RUN_STEP) and is still finishing after $seconds seconds; wait with just kill-train"
        die "the run has not left after $seconds seconds and is left alone; look at it with just attach-train"
    fi
fi
last_words 5
tmux kill-session -t "=$SESSION" 2>/dev/null || true
say "the session has ended"
