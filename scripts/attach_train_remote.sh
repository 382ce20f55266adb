#!/usr/bin/env bash
# Show the training session of this host:
#
#   scripts/attach_train_remote.sh
#
# Where the training has ended, its last words are printed instead.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"
use_tools

case $(session_state) in
    running) exec tmux attach-session -t "=$SESSION" ;;
    ended)
        last_words 30
        say "the training has ended; these were its last words (just list-runs tells how runs stand)"
        ;;
    none) die "there is no training session on this host; just list-runs tells how runs stand" ;;
esac
