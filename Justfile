# `just` alone lists what there is. Names may stand before a recipe or after it: `just config=x train`, `just train config=x`.

set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments

# A configuration: a file of the checkout, or the name of a shipped one
config := ""
# Further arguments of transformerlm-train, as on a command line
extra := ""
# What `infer` runs, and its arguments
command := env("CMD_INFER", "uv run transformerlm-infer")
args := ""
# A file or folder below REMOTE_ROOT
any_file := ""
# A file with a host on each line
hosts := ""
# A file with the settings of a run on each line
overrides := ""
# Flags of scripts/fetch_data.sh
data := ""

remote := quote(justfile_directory() / "scripts/remote.sh")

# List the recipes
_default:
    @just --list --unsorted

# -- work on the project -----------------------------------------------------------------------------------------------

# Install everything into .venv, development tools included
[group('develop')]
setup:
    uv sync
    uv run pre-commit install

# Format and fix what can be fixed
[group('develop')]
fmt:
    uv run ruff format .
    uv run ruff check --fix .

# All static checks: format, lint, types, import rules, shell scripts
[group('develop')]
check: lint-shell
    uv run ruff format --check .
    uv run ruff check .
    uv run pyright
    uv run lint-imports

# The shell scripts, where shellcheck is installed
[group('develop')]
lint-shell:
    @if command -v shellcheck >/dev/null; then shellcheck -x scripts/*.sh infra/*.sh infra/*.sbatch; else echo "shellcheck is not installed"; fi

# Tests; for instance `just test -m "not slow and not gpu"`
[group('develop')]
test *args:
    uv run pytest "$@"

# Kill training 200 times, anywhere, and compare every bit with the undisturbed run; one SHA on eight ranks (about 10 minutes)
[group('develop')]
torture:
    uv run pytest -m torture -s

# The loop against a hand-written one
[group('develop')]
bench:
    uv run python -m benchmarking.bench_loop

# -- a remote GPU host: PRIME_HOST=user@host, REMOTE_ROOT=folder there (docs/remote.md) --------------------------------

# Everything at once: bootstrap-remote, data-remote, sync-env, train
[group('remote')]
[no-cd]
[no-exit-message]
auto-train *words:
    @{{ remote }} auto-train config={{ quote(config) }} extra={{ quote(extra) }} data={{ quote(data) }} "$@"

# Install uv, just and tmux on the host, bring the code there, make data/, runs/ and env/
[group('remote')]
[no-cd]
[no-exit-message]
bootstrap-remote:
    @{{ remote }} bootstrap

# Download tokenizer and token files to data/ on the host (`--gpt2` for GPT-2's tokenizer, `--no-bins` for no token files)
[group('remote')]
[no-cd]
[no-exit-message]
data-remote *flags:
    @{{ remote }} data data={{ quote(data) }} "$@"

# Bring the code to the host and install what it needs there (uv sync)
[group('remote')]
[no-cd]
[no-exit-message]
build-remote:
    @{{ remote }} build

# Send env/*.env (credentials) to the host, for the eyes of its owner only
[group('remote')]
[no-cd]
[no-exit-message]
sync-env:
    @{{ remote }} sync-env

# Train in the tmux session transformerlm-train: `just train config=train_packed extra="training.max_steps=500"`
[group('remote')]
[no-cd]
[no-exit-message]
train *words:
    @{{ remote }} train config={{ quote(config) }} extra={{ quote(extra) }} "$@"

# One run after the other, with the settings on each line of a file: `just sweep overrides=sweep.txt config=train`
[group('remote')]
[no-cd]
[no-exit-message]
sweep *words:
    @{{ remote }} sweep config={{ quote(config) }} extra={{ quote(extra) }} overrides={{ quote(overrides) }} "$@"

# Train one model on all hosts of a list: `just launch hosts=hosts.txt config=train`
[group('remote')]
[no-cd]
[no-exit-message]
launch *words:
    @{{ remote }} launch config={{ quote(config) }} extra={{ quote(extra) }} hosts={{ quote(hosts) }} "$@"

# A recipe on each host of a list: `just each hosts=hosts.txt bootstrap-remote`
[group('remote')]
[no-cd]
[no-exit-message]
each *words:
    @{{ remote }} each hosts={{ quote(hosts) }} "$@"

# Watch the training (leave with Ctrl-b d; it goes on)
[group('remote')]
[no-cd]
[no-exit-message]
attach-train:
    @{{ remote }} attach

# Ask the run to save, wait for it, end the session: `just kill-train 60` waits a minute at most
[group('remote')]
[no-cd]
[no-exit-message]
kill-train *seconds:
    @{{ remote }} kill "$@"

# The runs on the host, with state and last step
[group('remote')]
[no-cd]
[no-exit-message]
list-runs:
    @{{ remote }} list-runs

# Copy a file or folder below REMOTE_ROOT into the current folder: `just fetch any_file=runs/simplestories`
[group('remote')]
[no-cd]
[no-exit-message]
fetch *words:
    @{{ remote }} fetch any_file={{ quote(any_file) }} "$@"

# Run a command on the host: `just infer args='--checkpoint runs/simplestories --prompt "One day"'`
[group('remote')]
[no-cd]
[no-exit-message]
infer *words:
    @{{ remote }} infer command={{ quote(command) }} args={{ quote(args) }} "$@"

# The GPUs of the host
[group('remote')]
[no-cd]
[no-exit-message]
nvitop:
    @{{ remote }} nvitop
