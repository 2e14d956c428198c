#!/usr/bin/env bash
# One entry to everything. Sets up .venv when needed, then:
#
#   bash launch.sh                    the offline demo: train a tiny model on toy voices, then generate speech
#   bash launch.sh [train] --FLAG...  train.py on every GPU of this node, or on NPROC ranks
#   TRAIN_MANIFEST=train.jsonl OUTPUT_DIR=runs/voice bash launch.sh      the same from variables, see below
#   bash launch.sh voice recording.m4a --name anna     from a long recording to a voice, in one command
#   bash launch.sh NAME [ARGS...]     prepare, generate, evaluate, export, merge, average, show, plan, report, replay or demo
#   bash launch.sh bench NAME [ARGS...]  benchmarks/NAME.py
#   bash launch.sh test [ARGS...]     pytest tests/, or pytest ARGS...
#   bash launch.sh setup              only set up
#
# `prepare encode`, `generate --lines` and `evaluate` also use every GPU. Several nodes: the same line on each, with NNODES,
# NODE_RANK and MASTER_ADDR set, and an output folder that all of them see.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ---- settings: edit here, or give them as environment variables; they win over --config FILE, arguments win over all ---
# Any of these flags of train.py may be set by its name in capitals: TRAIN_MANIFEST, OUTPUT_DIR, BATCH_SIZE, LORA_R ...
SETTINGS="train_manifest val_manifest output_dir base_ckpt audio_tokenizer batch_size grad_accum num_workers epochs
    max_steps lr warmup_steps lora_r lora_alpha lora_dropout mixed_precision activation_checkpointing val_steps save_steps
    resume"
# Values for a node of 8 GPUs; remove the '#' to use them.
#: "${BATCH_SIZE:=4}" "${GRAD_ACCUM:=4}" "${NUM_WORKERS:=16}"
#: "${LORA_R:=64}" "${LORA_ALPHA:=128}"
#: "${MIXED_PRECISION:=bf16}" "${ACTIVATION_CHECKPOINTING:=full}"

PYTHON=${PYTHON:-python3}
VENV=${VENV:-$ROOT/.venv}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
LOCK=${LOCK:-}                  # a file of versions to install, as requirements.lock
MAX_RESTARTS=${MAX_RESTARTS:-0} # how often a run that failed is continued from its newest checkpoint

# ---- what to run ------------------------------------------------------------------------------------------------------
TOOLS="voice prepare generate evaluate export merge average show plan report replay demo"

say() { echo "$1" >&2; }
fail() { say "error: $1" && exit 2; }

case "${1:-}" in
"") COMMAND=$([ -n "${TRAIN_MANIFEST:-}" ] && echo train || echo demo) ;;
-*) COMMAND=train ;;
*) COMMAND=$1 && shift ;;
esac
case " train test bench setup $TOOLS " in
*" $COMMAND "*) ;;
*) fail "launch.sh knows no '$COMMAND'; it knows train, test, bench, setup, ${TOOLS// /, }, and flags of train.py" ;;
esac
if [ "$COMMAND" = bench ]; then
    [ -f "$ROOT/benchmarks/${1:-}.py" ] ||
        fail "no benchmark '${1:-}'; there are: $(cd "$ROOT/benchmarks" && echo *.py | sed 's/\.py//g')"
    BENCHMARK=$1 && shift
fi

# ---- environment ------------------------------------------------------------------------------------------------------
check_python() { # ends with one line where no environment can be made of it
    command -v "$PYTHON" >/dev/null ||
        fail "no $PYTHON here; install Python 3.10 to 3.12 (Debian, Ubuntu: sudo apt install python3-venv) or name it: PYTHON="
    "$PYTHON" -c '
import sys
found = "%d.%d" % sys.version_info[:2]
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit("error: %s is Python %s, but 3.10 to 3.12 work; name one: PYTHON=python3.11 bash launch.sh" % (sys.argv[1], found))
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("error: Python %s has no %s (Debian, Ubuntu: sudo apt install python%s-venv)" % (found, error.name, found))
' "$PYTHON" || exit 2
}

make_venv() { # anew where it is half made; a folder of something else is not touched
    ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || return 0
    if [ -f "$VENV/pyvenv.cfg" ]; then
        say "$VENV is half made, or its Python is gone: it is made anew"
    elif [ -e "$VENV" ] && ! rmdir "$VENV" 2>/dev/null; then
        fail "VENV=$VENV is no virtual environment (it holds no pyvenv.cfg) and stays as it is; name another folder with VENV="
    fi
    watched "[1 of 3] a virtual environment of $("$PYTHON" --version 2>&1)" "$PYTHON" -m venv --clear "$VENV"
}

watched() { # title, command...: what pip is at, on a terminal in one line; why it failed
    local line all="" format
    format=$([ -t 2 ] && echo '\r\033[K  %.90s' || echo '  %s\n')
    say "$1" && shift
    { "$@" 2>&1 || echo "failed with $?"; } | {
        while read -r line; do
            all+=$line$'\n'
            case "$line" in
            Installing*) line="unpacking $(wc -w <<<"${line#*:}") package(s)" ;;
            *Retrying*) line="the package index does not answer; trying again" ;;
            Downloading*\ GB\) | Downloading*[0-9][0-9].?\ MB\)) ;; # large ones, also in a file
            *) [[ -t 2 && $line =~ ^(Collecting|Downloading) ]] || continue ;;
            esac
            printf "$format" "${line% (from*}" >&2
        done
        [ ! -t 2 ] || printf '\r\033[K' >&2
        [[ ! $all =~ failed\ with\ [0-9]+.$ ]] || fail "$(why "$all")"
    } || exit 2
}

why() { # the reason in what pip or venv printed; venv says nothing of a full disk
    case "$1$([ "$(df -Pm "$(dirname "$VENV")" | awk 'END { print $4 }')" -gt 100 ] || echo No space left)" in
    *"No space left"* | *"Disk quota"*)
        echo "no space left for $VENV or in ${TMPDIR:-/tmp}: make room (10 GB do), or name others: VENV=, TMPDIR=" ;;
    *NewConnection* | *"Failed to establish"* | *"name resolution"* | *ProxyError* | *"timed out"*)
        echo "no network: the package index does not answer; connect, or name a proxy (https_proxy=), a mirror (PIP_INDEX_URL=)" ;;
    *) echo "the set-up of $VENV failed: $(grep -v -e '^failed with' -e '^$' <<<"$1" | tail -n 3)" ;;
    esac
}

setup() { # stamp, requirements...
    # The stamp names what was installed: while it fits, nothing is done and no network is used.
    local stamp=$VENV/$1 is_first wanted
    local install=("$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off)
    is_first=$([ "$1" != .installed ] || echo yes) && shift
    wanted=$(cat "$@" | cksum)
    is_done() { [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; }
    ! is_done || return 0
    say "setting up $VENV for '$COMMAND'${is_first:+: a few GB to download, once; nothing else on this machine changes}"
    [ -z "$is_first" ] || check_python
    mkdir -p "$(dirname "$VENV")"
    exec 9>"$VENV.lock" # nodes may share this folder
    ! command -v flock >/dev/null || flock -n 9 || { say "waiting for another set-up of it" && flock 9; } ||
        say "note: no locks on this file system; set up on one node first"
    ! is_done || return 0
    [ -z "$is_first" ] || make_venv
    watched "${is_first:+[2 of 3] PyTorch and the rest of }${*##*/}" "${install[@]}" ${LOCK:+-c "$LOCK"} "${@/#/--requirement=}"
    [ -z "$is_first" ] || watched "[3 of 3] boson-multimodal" "${install[@]}" --no-deps boson-multimodal==0.1.1
    echo "$wanted" >"$stamp" && say "done, $SECONDS s after the start; now: $COMMAND"
    exec 9>&-
}

quantized_by_file() { # --quantize if a file that --config names says so
    while [ $# -gt 0 ]; do
        case "$1" in --config) cat -- "${2:-}" ;; --config=*) cat -- "${1#*=}" ;; esac
        shift
    done 2>/dev/null | sed -n 's/^ *"\{0,1\}quantize"\{0,1\}: *"\{0,1\}nf4.*/--quantize/p'
}

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    GPUS=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true)
else
    GPUS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
fi
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 1))}
for variable in NPROC NNODES NODE_RANK MASTER_PORT MAX_RESTARTS; do
    [[ ${!variable} =~ ^(0|[1-9][0-9]{0,4})$ ]] || fail "$variable=${!variable}: expected a number"
done
[ "$NPROC" -gt 0 ] || fail "NPROC=$NPROC: expected at least 1"

setup .installed "$ROOT/requirements.txt" "$ROOT/requirements-codec.txt"
case "$COMMAND" in evaluate | test) setup .installed-evaluate "$ROOT/requirements-evaluate.txt" ;; esac
case "$COMMAND" in test) setup .installed-datasets "$ROOT/requirements-datasets.txt" ;; esac # else prepare convert installs it
case "$COMMAND $*" in "prepare cut"* | voice* | test*) setup .installed-voice "$ROOT/requirements-voice.txt" ;; esac
case "$COMMAND $* $(quantized_by_file "$@")" in *--quantize* | plan* | test*) setup .installed-nf4 "$ROOT/requirements-nf4.txt" ;; esac
PY="$VENV/bin/python"
# Files are started by path, and Python is kept from looking for modules in the current folder: code there is the user's data.
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
CORES=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

on_ranks() { # torchrun's options, file, arguments...
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES / NPROC > 0 ? CORES / NPROC : 1))}
    exec "$PY" "$ROOT/tools/launch.py" --nproc_per_node="$NPROC" "$@"
}

alone() { # file, arguments...
    exec "$PY" "$ROOT/process/start.py" "$@"
}

on_every_gpu() { # file, arguments...
    if [ "$NPROC" -gt 1 ]; then on_ranks --standalone "$@"; else alone "$@"; fi
}

[ "$COMMAND" != demo ] || say "the demo: trains a tiny model on toy voices for some minutes, then lets it speak; needs no GPU"
case "$COMMAND ${1:-}" in
setup*) exit 0 ;;
"test ") # all of it: a file of tests per process, two to four at a time
    cd "$ROOT" && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "$PY" -m pytest -n $((CORES < 2 ? 1 : CORES > 4 ? 4 : CORES)) --dist loadfile --no-loadscope-reorder tests/ ;;
test*) cd "$ROOT" && exec "$PY" -m pytest "$@" ;;
bench*) alone "$ROOT/benchmarks/$BENCHMARK.py" "$@" ;;
train*) ;;
"prepare encode") on_every_gpu "$ROOT/prepare/__main__.py" "$@" ;;
prepare*) alone "$ROOT/prepare/__main__.py" "$@" ;;
generate*) case " $* " in
    *" --lines"[=\ ]*) on_every_gpu "$ROOT/generate/__main__.py" "$@" ;; # one text needs one rank
    *) alone "$ROOT/generate/__main__.py" "$@" ;;
    esac ;;
evaluate*) on_every_gpu "$ROOT/generate/evaluate.py" "$@" ;;
export* | merge* | average* | show*) alone "$ROOT/export/__main__.py" "$COMMAND" "$@" ;;
*) alone "$ROOT/tools/$COMMAND.py" "$@" ;;
esac

# ---- train ------------------------------------------------------------------------------------------------------------
ARGS=()
for name in $SETTINGS; do
    variable=$(tr '[:lower:]' '[:upper:]' <<<"$name")
    [ -z "${!variable:-}" ] || ARGS+=("--$name" "${!variable}")
done
ARGS+=("$@")

export NCCL_IB_DISABLE=${NCCL_IB_DISABLE:-0} NCCL_P2P_DISABLE=${NCCL_P2P_DISABLE:-0}
[ -n "${PYTORCH_ALLOC_CONF:-}" ] || export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

RENDEZVOUS=(--standalone)
[ "$NNODES" = 1 ] || RENDEZVOUS=(--rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv_id="higgs-$MASTER_PORT"
    --rdzv_conf="is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
on_ranks --nnodes="$NNODES" --max_restarts="$MAX_RESTARTS" "${RENDEZVOUS[@]}" "$ROOT/train.py" "${ARGS[@]}"
