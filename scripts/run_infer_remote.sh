#!/usr/bin/env bash
# Run an inference or benchmark command on this host, in the checkout and its environment:
#
#   scripts/run_infer_remote.sh COMMAND [ARGUMENTS]
#
# Both are lines of shell, as one would type them: 'uv run transformerlm-infer' '--checkpoint runs/tiny --prompt "Once"'.
# Credentials and settings are read from .env and env/*.env.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"
use_tools
cd "$ROOT"

[[ $# -ge 1 && $# -le 2 ]] || usage "give a command and, in one word, its arguments"
load_env .env env/*.env
exec bash -c "$1 ${2:-}"
