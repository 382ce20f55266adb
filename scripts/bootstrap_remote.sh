#!/usr/bin/env bash
# Prepare this host for training; `just bootstrap-remote` sends it over ssh, so that it stands alone.
#
#   bash bootstrap_remote.sh ROOT [REPOSITORY [BRANCH]]
#
# Installs tmux, rsync, git and curl with the package manager, uv and just with pip or uv's own installer, each where it is
# missing; clones REPOSITORY (or brings the clone up to date) where one is named; makes data/, runs/ and env/ in ROOT.
set -euo pipefail

main() {
    local root=$1 repository=${2:-} branch=${3:-}
    export PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"
    install_packages
    install_uv
    has just || uv tool install --quiet rust-just || pip_install rust-just || say "just could not be installed"
    if [[ -n $repository ]]; then
        check_out "$repository" "$branch" "$root"
    fi
    mkdir -p "$root/data" "$root/runs" "$root/env"
    chmod 700 "$root/env"
    say "$(hostname): $root is ready; $(describe_gpus)"
}

say() { printf 'bootstrap: %s\n' "$*" >&2; }

has() { command -v "$1" >/dev/null 2>&1; }

install_packages() {
    local missing=() name
    for name in tmux rsync git curl; do
        has "$name" || missing+=("$name")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    say "installing ${missing[*]}"
    packages "${missing[@]}" || true
    for name in tmux git curl; do
        has "$name" || { say "$name is missing and could not be installed; install it as root" && exit 1; }
    done
    has rsync || say "rsync is missing: files will travel by tar, from the start each time"
}

packages() {
    local sudo=()
    [[ $(id -u) == 0 ]] || sudo=(sudo -n)
    run() { ${sudo[@]+"${sudo[@]}"} "$@"; }
    if has apt-get; then
        run apt-get update -qq && run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    elif has dnf; then
        run dnf install -y -q "$@"
    elif has yum; then
        run yum install -y -q "$@"
    elif has apk; then
        run apk add --quiet "$@"
    elif has pacman; then
        run pacman -Sy --noconfirm "$@"
    elif has zypper; then
        run zypper --non-interactive install "$@"
    elif has brew; then
        brew install "$@"
    else
        say "this system has no package manager that is known here"
        return 1
    fi </dev/null >&2 # the standard input is this script
}

install_uv() {
    has uv && return
    say "installing uv"
    pip_install uv || curl -LsSf https://astral.sh/uv/install.sh | sh >&2 || true
    has uv || { say "uv could not be installed; see https://docs.astral.sh/uv" && exit 1; }
}

pip_install() {
    has python3 || return 1
    python3 -m pip install --quiet --user "$@" </dev/null >&2 ||
        python3 -m pip install --quiet --user --break-system-packages "$@" </dev/null >&2
}

# Where data/ or runs/ is there already, git would refuse to clone.
check_out() {
    local repository=$1 branch=$2 root=$3
    [[ -d $root/.git ]] || git init --quiet "$root"
    git -C "$root" remote add origin "$repository" 2>/dev/null || git -C "$root" remote set-url origin "$repository"
    git -C "$root" fetch --quiet origin "${branch:-HEAD}" </dev/null
    git -C "$root" checkout --quiet --detach FETCH_HEAD
}

describe_gpus() {
    if has nvidia-smi; then
        nvidia-smi --query-gpu=name --format=csv,noheader </dev/null | sort | uniq -c | tr -s ' \n' ' '
    else
        echo "no NVIDIA GPU"
    fi
}

main "$@"
