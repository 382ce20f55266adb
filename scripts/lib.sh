# shellcheck shell=bash
# What the scripts share; they source it. It runs under the bash 3.2 of macOS too.

SESSION=transformerlm-train
# Settings, none of them secret, that travel from a person's terminal to the host and into the session there.
FORWARDED="WANDB_MODE WANDB_PROJECT WANDB_ENTITY HF_DATASETS_OFFLINE TRANSFORMERLM_LOG"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

usage() {
    say "$*"
    exit 2
}

has() { command -v "$1" >/dev/null 2>&1; }

# Commands that uv and its installer leave in the home folder, which a shell without a login does not look into.
use_tools() { export PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"; }

# load_env FILE…: NAME=value lines, with quotes and comments, as the console scripts read them. Nothing in them is
# executed, what is set already wins, and a complaint never shows the line, which may hold a secret.
load_env() {
    local file line name value number
    for file in "$@"; do
        [[ -f $file ]] || continue
        number=0
        while IFS= read -r line || [[ -n $line ]]; do
            number=$((number + 1))
            line=${line%$'\r'}
            [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
            [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*=[[:space:]]*(.*)$ ]] ||
                usage "line $number of $file is not NAME=value"
            name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
            [[ -n ${!name+set} ]] && continue
            if [[ $value =~ ^\"([^\"]*)\"[[:space:]]*(#.*)?$ || $value =~ ^\'([^\']*)\'[[:space:]]*(#.*)?$ ]]; then
                value=${BASH_REMATCH[1]}
            else
                [[ $value == \#* ]] && value=
                value=${value%%[[:space:]]#*}
                value=${value%"${value##*[![:space:]]}"}
            fi
            export "$name=$value"
        done <"$file"
    done
}

# split_words TEXT: the words of TEXT, quotes honoured and nothing expanded or executed, into the array WORDS.
split_words() {
    local word
    WORDS=()
    [[ $1 == *[![:space:]]* ]] || return 0
    printf '%s\n' "$1" | xargs printf '%s\0' >/dev/null 2>&1 || usage "the quotes do not match in: $1"
    while IFS= read -r -d '' word; do
        WORDS+=("$word")
    done < <(printf '%s\n' "$1" | xargs printf '%s\0')
}

# quoted WORD…: one line that every shell reads back as exactly these words.
quoted() {
    local word quote="'" escaped="'\\''"
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:@%+,-][A-Za-z0-9_./:@%+,=-]*$ ]]; then
            printf '%s ' "$word"
        else
            printf "'%s' " "${word//$quote/$escaped}"
        fi
    done
}

# Where uv is, it finds the environment; without it, an activated one is used as it is.
in_environment() {
    if has uv; then
        uv run "$@"
    else
        "$@"
    fi
}

# A lock file that does not fit (edited by hand, another platform) is no reason to train nothing.
sync_dependencies() {
    [[ -z ${UV_NO_SYNC:-} ]] || return 0
    uv sync || {
        say "uv sync failed; trying the lock file as it is"
        uv sync --frozen
    }
}

# forwarded: the settings of FORWARDED that are set, as NAME=value, into the array SETTINGS.
forwarded() {
    local name
    SETTINGS=()
    for name in $FORWARDED; do
        [[ -z ${!name:-} ]] || SETTINGS+=("$name=${!name}")
    done
}

# The state of the training session: none, ended (its last words are still to be read) or running.
session_state() {
    local dead
    dead=$(tmux list-panes -t "=$SESSION:" -F '#{pane_dead}' 2>/dev/null | head -n 1) || true
    case $dead in
        0) echo running ;;
        1) echo ended ;;
        *) echo none ;;
    esac
}

# last_words N: the last N lines of the session, without empty ones. Above its visible part, too (-S -), where a pane that
# has ended keeps what it said; lines wider than the pane in one piece (-J).
last_words() {
    tmux capture-pane -p -J -S - -t "=$SESSION:" 2>/dev/null | grep -v '^[[:space:]]*$' | tail -n "$1" || true
}

# run_since TIME: the run in runs/ whose status was last written, if that was since TIME (seconds of 1970): its name, state
# and step into RUN_NAME, RUN_STATE, RUN_STEP, which are empty where there is none.
# shellcheck disable=SC2034 # its callers read them
run_since() {
    local file time newest=$1
    RUN_NAME='' RUN_STATE='' RUN_STEP=''
    for file in runs/*/status.json; do
        [[ -f $file ]] || continue
        time=$(status_field time "$file")
        time=${time%.*}
        [[ ${time:-0} -ge $newest ]] || continue
        newest=$time
        RUN_NAME=$(basename "$(dirname "$file")")
        RUN_STATE=$(status_field status "$file")
        RUN_STEP=$(status_field step "$file")
    done
}

status_field() { sed -n "s/^ *\"$1\": *\"\{0,1\}\([^\",]*\).*/\1/p" "$2" 2>/dev/null || true; }
