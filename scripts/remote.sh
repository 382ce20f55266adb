#!/usr/bin/env bash
# The local half of the remote recipes; the Justfile calls it: scripts/remote.sh RECIPE [name=value | word]…
#
#   PRIME_HOST    where: user@host, or a name from the ssh configuration
#   REMOTE_ROOT   the checkout there; relative to the home folder (default: transformerlm)
#   REPO_URL      clone this repository there (REPO_BRANCH of it), instead of sending the files of this checkout
#   SSH_OPTIONS   words for ssh, such as "-p 2222 -i key"; SSH_CONFIG names a configuration file
#   ENV_DIR       folder of the *.env files that sync-env sends (default: env)
#   DRY_RUN=1     print what would run on the host, and run nothing
#
# They may stand in .env; the environment wins. Where words travel through ssh, each arrives as it was given.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"

DEFAULT_CONFIG=config/resources/simplestories.toml
# shellcheck disable=SC2016 # it is for the other side to expand
IN_CHECKOUT='cd "$1" 2>/dev/null || { echo "there is no checkout $1 on this host; run: just bootstrap-remote" >&2; exit 1; }
shift; export PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"; exec "$@"'
SSH_DEFAULTS=(-o ServerAliveInterval=15 -o ServerAliveCountMax=4)

main() {
    local recipe=$1 config='' extra='' command='' args='' any_file='' hosts='' overrides='' data='' words=() word
    shift
    for word in "$@"; do
        case $word in
            # The Justfile's variables come first, so that what stands after the recipe wins.
            config=* | extra=* | command=* | args=* | any_file=* | hosts=* | overrides=* | data=*)
                printf -v "${word%%=*}" %s "${word#*=}"
                ;;
            *) words+=("$word") ;;
        esac
    done
    load_env "$ROOT/.env"
    REMOTE_ROOT=${REMOTE_ROOT:-transformerlm}
    REMOTE_ROOT=${REMOTE_ROOT#"~/"}
    case $recipe in
        launch | each) ;;
        *) connect ;;
    esac
    "recipe_${recipe//-/_}" ${words[@]+"${words[@]}"}
}

# -- recipes -----------------------------------------------------------------------------------------------------------

recipe_bootstrap() {
    remote_reading "$ROOT/scripts/bootstrap_remote.sh" bash -s -- "$REMOTE_ROOT" "${REPO_URL:-}" "${REPO_BRANCH:-}"
    update_code
}

# shellcheck disable=SC2120 # the dispatcher passes them
recipe_data() {
    split_words "$data${*:+ $*}"
    in_checkout env "SIMPLESTORIES_URL=${SIMPLESTORIES_URL:-}" "GPT2_URL=${GPT2_URL:-}" \
        bash scripts/fetch_data.sh data ${WORDS[@]+"${WORDS[@]}"}
}

recipe_build() {
    update_code
    in_checkout bash -c 'source scripts/lib.sh && load_env .env env/*.env && sync_dependencies' build-remote
}

recipe_sync_env() {
    local folder=${ENV_DIR:-$ROOT/env} file
    for file in "$folder"/*.env; do
        [[ -f $file ]] || usage "there is no $folder/wandb.env: copy $ROOT/env/wandb.env.example to it and fill it in"
        chmod 600 "$file"
        # shellcheck disable=SC2016 # it is for the other side to expand
        remote_reading "$file" bash -c 'umask 077; mkdir -p "${1%/*}" && cat >"$1.new" && mv "$1.new" "$1"' sync_env \
            "$REMOTE_ROOT/env/${file##*/}"
        report "${file##*/} is on the host, readable by its owner alone" "would send ${file##*/}"
    done
}

recipe_train() {
    update_code
    training_words "$@"
    start_training -- "${WORDS[@]}"
}

recipe_sweep() {
    local line sweep=()
    [[ -f $overrides ]] || usage "name the file with one line of settings for each run: just sweep overrides=sweep.txt"
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] || sweep+=(--sweep "$line")
    done <"$overrides"
    [[ ${#sweep[@]} -gt 0 ]] || usage "$overrides names no run"
    update_code
    training_words "$@"
    start_training "${sweep[@]}" -- "${WORDS[@]}"
}

# One rank list over several hosts. The first line names the host where the ranks meet: an address that the others reach
# may stand behind it.
recipe_launch() {
    local nodes=0 rank=0 meeting='' host address arguments
    read_hosts
    nodes=${#HOSTS[@]}
    [[ $nodes -gt 1 ]] || usage "$hosts names one host: use just train"
    training_words "$@"
    arguments=("${WORDS[@]}")
    for rank in $(seq 0 $((nodes - 1))); do
        host=${HOSTS[$rank]} address=${ADDRESSES[$rank]}
        [[ $rank != 0 ]] || meeting=${address:-${host##*@}}:${RENDEZVOUS_PORT:-29500}
        PRIME_HOST=$host
        connect
        update_code
        say "$host: node $rank of $nodes, meeting at $meeting"
        start_training --nodes "$nodes" --node-rank "$rank" --rendezvous "$meeting" -- "${arguments[@]}"
    done
}

# each RECIPE [WORD]…: the recipe on all hosts of the list, one after the other.
recipe_each() {
    local host
    [[ $# -ge 1 ]] || usage "name a recipe: just each hosts=hosts.txt bootstrap-remote"
    read_hosts
    for host in "${HOSTS[@]}"; do
        say "$host: just $*"
        PRIME_HOST=$host just --justfile "$ROOT/Justfile" "$@"
    done
}

recipe_infer() {
    local where=in_checkout
    # Where a person sits, the command may want to talk to them (--interactive).
    [[ ! (-t 0 && -t 1) ]] || where=in_checkout_on_terminal
    $where bash scripts/run_infer_remote.sh "${command:-uv run transformerlm-infer}" "$args${*:+ $*}"
}

recipe_nvitop() { in_checkout_on_terminal bash scripts/run_infer_remote.sh "uv run nvitop" "$*"; }

recipe_attach() { in_checkout_on_terminal bash scripts/attach_train_remote.sh; }

recipe_kill() { in_checkout bash scripts/stop_train_remote.sh "$@"; }

# Into the current folder.
recipe_fetch() {
    any_file=${any_file:-${1:-}}
    [[ -n $any_file ]] || usage "name a file or folder below $REMOTE_ROOT: just fetch any_file=runs/simplestories"
    local path=${any_file%/}
    # shellcheck disable=SC2016 # it is for the other side to expand
    in_checkout bash -c '[[ -e $1 || -L $1 ]] || { echo "there is no $1 on the host; see just list-runs" >&2; exit 1; }' \
        fetch "$path"
    if rsync_is_there; then
        # A run that trains meanwhile deletes checkpoints: 24 says that some files were gone when their turn came. What is
        # being written or deleted there stands under a hidden name and is not worth the way.
        copy -a --partial --exclude '.*.tmp-*' "$PRIME_HOST:$REMOTE_ROOT/$path" . || [[ $? -eq 24 ]]
    else
        remote tar -C "$REMOTE_ROOT/$(dirname "$path")" -cf - -- "$(basename "$path")" | tar -xf -
    fi
    report "${path##*/} is here" "would fetch ${path##*/}"
}

recipe_list_runs() {
    # shellcheck disable=SC2016 # it is for the other side to expand
    in_checkout bash -c 'python=$(command -v python3 || echo "uv run --no-project python"); $python scripts/list_runs.py runs'
}

recipe_auto_train() {
    recipe_bootstrap
    # shellcheck disable=SC2119
    recipe_data
    if compgen -G "${ENV_DIR:-$ROOT/env}/*.env" >/dev/null; then
        recipe_sync_env
    else
        say "no env/*.env to send"
    fi
    recipe_train "$@"
}

# -- what they are made of ---------------------------------------------------------------------------------------------

connect() {
    [[ -n ${PRIME_HOST:-} ]] || usage "PRIME_HOST is not set: PRIME_HOST=user@host just …, or write it into .env"
    [[ $PRIME_HOST != -* ]] || usage "PRIME_HOST is a host, not an option: $PRIME_HOST"
    split_words "${SSH_OPTIONS:-}"
    SSH=(ssh "${SSH_DEFAULTS[@]}" ${SSH_CONFIG:+-F "$SSH_CONFIG"} ${WORDS[@]+"${WORDS[@]}"})
}

remote() { remote_reading /dev/null "$@"; }

# remote_reading FILE WORD…: the words on the host, with FILE as their standard input.
remote_reading() {
    local input=$1
    shift
    run_or_show "${SSH[@]}" -- "$PRIME_HOST" "$(quoted "$@")" <"$input"
}

on_terminal() { run_or_show "${SSH[@]}" -t -- "$PRIME_HOST" "$(quoted "$@")"; }

in_checkout() { remote bash -c "$IN_CHECKOUT" in_checkout "$REMOTE_ROOT" "$@"; }

in_checkout_on_terminal() { on_terminal bash -c "$IN_CHECKOUT" in_checkout "$REMOTE_ROOT" "$@"; }

# A checkout that is there gets what has changed here, unless a training runs in it.
update_code() {
    [[ -z ${REPO_URL:-} ]] || return 0
    local state=none
    # Of a checkout without scripts yet, a bootstrap that broke off, nothing is known but that it wants them.
    [[ -n ${DRY_RUN:-} ]] ||
        state=$(in_checkout bash -c '[[ ! -f scripts/lib.sh ]] || { source scripts/lib.sh && session_state; }')
    if [[ $state == running ]]; then
        say "a training runs on the host: the code there stays as it is"
    else
        send_code
    fi
}

start_training() {
    forwarded
    in_checkout env ${SETTINGS[@]+"${SETTINGS[@]}"} bash scripts/run_train_remote.sh "$@"
}

run_or_show() {
    if [[ -n ${DRY_RUN:-} ]]; then
        quoted "$@" && echo
    else
        "$@"
    fi
}

# report DONE WOULD: a dry run has done nothing.
report() {
    if [[ -n ${DRY_RUN:-} ]]; then
        say "$2"
    else
        say "$1"
    fi
}

# training_words WORD…: the arguments of transformerlm-train into WORDS: config=, extra=, and the words as they are. A
# configuration is a file of the checkout, or the name of one that is shipped; --text brings its own.
training_words() {
    split_words "$extra"
    WORDS+=("$@")
    case " ${WORDS[*]+"${WORDS[*]}"}" in
        *" --text "* | *" --text="*) ;;
        *) config=${config:-$DEFAULT_CONFIG} ;;
    esac
    case $config in
        '') ;;
        */* | *.toml) WORDS=(--config "$config" ${WORDS[@]+"${WORDS[@]}"}) ;;
        *) WORDS=(--config-name "$config" ${WORDS[@]+"${WORDS[@]}"}) ;;
    esac
}

read_hosts() {
    local host address
    HOSTS=() ADDRESSES=()
    [[ -f $hosts ]] || usage "name the file with one host on each line: hosts=hosts.txt"
    while read -r host address || [[ -n $host ]]; do
        [[ -z $host || $host == \#* ]] && continue
        HOSTS+=("$host") ADDRESSES+=("$address")
    done <"$hosts"
    [[ ${#HOSTS[@]} -gt 0 ]] || usage "$hosts names no host"
}

# On both sides. A dry run shows the usual case.
rsync_is_there() {
    [[ -n ${DRY_RUN:-} ]] || { has rsync && remote sh -c 'command -v rsync' >/dev/null; }
}

# copy RSYNC_ARGUMENT…
copy() {
    local shell='' word quote="'" protect=()
    for word in "${SSH[@]}"; do
        shell+="'${word//$quote/$quote$quote}' " # rsync takes a doubled quote for one
    done
    # Names with special characters must not be read by the shell of the other side; openrsync lacks the flag.
    [[ $REMOTE_ROOT$any_file != *[!A-Za-z0-9_./-]* ]] || protect=(-s)
    run_or_show rsync --rsh "$shell" ${protect[@]+"${protect[@]}"} "$@"
}

# What git knows of this checkout, uncommitted changes and new files included, and nothing that it ignores. A file that was
# sent before and is gone here goes there too. In a process of its own: its list goes with it, however it ends.
send_code() (
    list=$(mktemp)
    trap 'rm -f "$list"' EXIT
    (
        cd "$ROOT"
        git ls-files -z --cached --others --exclude-standard |
            while IFS= read -r -d '' file; do
                [[ ! -e $file && ! -L $file ]] || printf '%s\0' "$file"
            done >"$list"
    ) || die "the files to send are what git lists, and $ROOT is no git checkout; set REPO_URL"
    if rsync_is_there; then
        copy -az --from0 --files-from "$list" "$ROOT/" "$PRIME_HOST:$REMOTE_ROOT/"
    else
        tar -C "$ROOT" --null -T "$list" -czf - | remote_reading /dev/stdin tar -C "$REMOTE_ROOT" -xzf -
    fi
    # shellcheck disable=SC2016 # it is for the other side to expand
    remote_reading "$list" bash -c 'export LC_ALL=C; cd "$1" && sort -z >.sent.new && touch .sent &&
comm -z -23 .sent .sent.new | xargs -0 -r rm -f -- && mv .sent.new .sent' send_code "$REMOTE_ROOT"
    report "sent the files of $ROOT" "would send the files of $ROOT"
)

main "$@"
