#!/usr/bin/env bash
# Download the SimpleStories tokenizer (8k) and token files into a folder:
#
#   scripts/fetch_data.sh DIRECTORY [--no-bins] [--gpt2] [--verify]
#
#   --no-bins   the tokenizer alone, without the Megatron .bin/.idx files
#   --gpt2      GPT-2's vocab.json and merges.txt too, into DIRECTORY/gpt2
#   --verify    check what is there already against DIRECTORY/SHA256SUMS
#
# What is there is skipped. A file appears under its name only when it is whole: its size, and the SHA-256 or git hash that
# the server states, agree. A download that broke off goes on where it stopped. DIRECTORY/simplestories_8k is a tokenizer
# folder (tokenizer.path) made of links to the files.
#
# SIMPLESTORIES_URL and GPT2_URL name other places to download from; HF_TOKEN (in .env, too) opens private ones.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
source "$ROOT/scripts/lib.sh"

SUMS=SHA256SUMS
TOKENIZER=simplestories_8k

main() {
    local directory='' bins=true gpt2=false verify=false argument
    for argument in "$@"; do
        case $argument in
            --no-bins) bins=false ;;
            --gpt2) gpt2=true ;;
            --verify) verify=true ;;
            -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
            -*) usage "there is no flag $argument (--help shows them)" ;;
            *) [[ -z $directory ]] || usage "name one directory"; directory=$argument ;;
        esac
    done
    [[ -n $directory ]] || usage "name the directory: scripts/fetch_data.sh data"
    load_env "$ROOT/.env"
    local simplestories=${SIMPLESTORIES_URL:-https://huggingface.co/datasets/trixyL/simplestories-8k-megatron/resolve/main}
    local gpt2_url=${GPT2_URL:-https://huggingface.co/openai-community/gpt2/resolve/main}
    has curl || die "curl is missing; install it with the package manager of this system"
    mkdir -p "$directory"
    cd "$directory"
    if $verify; then verify_files; fi

    local name
    for name in vocab_$TOKENIZER.json merges_$TOKENIZER.txt special_tokens_$TOKENIZER.json; do
        fetch "$simplestories/$name" "$name"
    done
    link_tokenizer
    if $bins; then
        for name in simplestories_{train,test}_text_document.{bin,idx}; do
            fetch "$simplestories/$name" "$name"
        done
    fi
    if $gpt2; then
        # The same for everybody who has ever used GPT-2's tokenizer, so that it is known here.
        fetch "$gpt2_url/vocab.json" gpt2/vocab.json 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
        fetch "$gpt2_url/merges.txt" gpt2/merges.txt
    fi
}

# fetch URL NAME [SHA256]
fetch() {
    local url=$1 name=$2 known=${3:-}
    local part=$name.part
    if [[ -f $name ]]; then
        say "$name is there"
        return
    fi
    mkdir -p "$(dirname "$name")"
    say "$name from $url"
    download "$url" "$part" || die "$url cannot be downloaded; check the network and the address, then run this again"
    check "$part" "$part.headers" "$known" || {
        rm -f "$part" "$part.headers"
        die "$name arrived damaged ($PROBLEM) and was removed; run this again"
    }
    mv "$part" "$name"
    rm -f "$part.headers"
    # One writer, and a line is short: what breaks off here is found by --verify, which names the file.
    printf '%s  %s\n' "$(sha256 "$name")" "$name" >>$SUMS
}

# A token travels in a file of curl's own format on the standard input, since anyone may read command lines.
download() {
    local url=$1 part=$2 header=''
    [[ -z ${HF_TOKEN:-} ]] || header="header = \"Authorization: Bearer $HF_TOKEN\""
    if [[ -s $part ]]; then
        # Not every server goes on in the middle of a file, and one that has it all refuses to: then from the start.
        curl_file "$header" -C - "$url" "$part" 2>/dev/null && return
        rm -f "$part"
    fi
    curl_file "$header" "$url" "$part"
}

# curl_file HEADER [-C -] URL PART
curl_file() {
    local header=$1 part="${*: -1}"
    local url="${*: -2:1}"
    shift
    local resume=()
    [[ $1 != -C ]] || resume=(-C -)
    printf '%s\n' "$header" | curl --config - --fail --location --show-error --silent --retry 3 --connect-timeout 30 \
        --dump-header "$part.headers" --output "$part" ${resume[@]+"${resume[@]}"} "$url"
}

# check FILE HEADERS [SHA256]: the Hugging Face hub states size and hash in the headers of its redirect: a SHA-256 of
# large files, git's hash of small ones. Another server states the size alone. Sets PROBLEM.
check() {
    local file=$1 headers=$2 known=$3 bytes stated hash
    bytes=$(wc -c <"$file" | tr -d ' ')
    stated=$(header "$headers" x-linked-size)
    # Of the part that was still missing, where the download went on: the range tells the whole.
    [[ -n $stated ]] || stated=$(header "$headers" content-range | sed 's|.*/||')
    [[ -n $stated ]] || stated=$(content_length "$headers")
    PROBLEM="it has $bytes bytes of $stated"
    [[ -z $stated || $bytes == "$stated" ]] || return 1
    hash=$known
    [[ -n $hash ]] || hash=$(header "$headers" x-linked-etag)
    PROBLEM="its hash is not $hash"
    if [[ $hash =~ ^[0-9a-f]{64}$ ]]; then
        [[ $(sha256 "$file") == "$hash" ]] || return 1
    elif [[ $hash =~ ^[0-9a-f]{40}$ ]]; then
        [[ $({ printf 'blob %s\0' "$bytes" && cat "$file"; } | sha1) == "$hash" ]] || return 1
    fi
}

# The last value of a header, without quotes, over all responses of the redirects.
header() {
    tr -d '\r' <"$1" | { grep -i "^$2:" || true; } | tail -n 1 | sed 's/^[^:]*: *//; s/^W\///; s/"//g'
}

# Of an encoded (compressed) answer, the length is not that of the file.
content_length() {
    [[ -n $(header "$1" content-encoding) ]] || header "$1" content-length
}

sha256() { hash_with 256 <"$1"; }

sha1() { hash_with 1; }

# macOS calls it otherwise.
hash_with() {
    if has "sha$1sum"; then
        "sha$1sum"
    else
        shasum -a "$1"
    fi | cut -d ' ' -f 1
}

link_tokenizer() {
    mkdir -p $TOKENIZER
    ln -sfn ../vocab_$TOKENIZER.json $TOKENIZER/vocab.json
    ln -sfn ../merges_$TOKENIZER.txt $TOKENIZER/merges.txt
    ln -sfn ../special_tokens_$TOKENIZER.json $TOKENIZER/special_tokens.json
}

verify_files() {
    local sum name damaged=0
    [[ -f $SUMS ]] || die "there is no $PWD/$SUMS to verify against"
    while read -r sum name; do
        [[ -f $name ]] || continue
        if [[ $(sha256 "$name") != "$sum" ]]; then
            say "$PWD/$name is not what was downloaded; delete it and run this again"
            damaged=1
        fi
    done <$SUMS
    [[ $damaged == 0 ]] || exit 1
    say "verified $PWD"
}

main "$@"
