#!/usr/bin/env bash
# One entry to everything. Sets up .venv when needed, then:
#
#   bash launch.sh                    the offline demo: train a tiny model on toy voices, then generate speech
#   bash launch.sh [train] --FLAG...  train.py on every GPU of this node, or on NPROC ranks
#   TRAIN_MANIFEST=train.jsonl OUTPUT_DIR=runs/voice bash launch.sh      the same from variables, see below
#   bash launch.sh NAME [ARGS...]     prepare, generate, evaluate, export, merge, average, show, plan, report, replay or demo
#   bash launch.sh bench NAME [ARGS...]  benchmarks/NAME.py
#   bash launch.sh test [ARGS...]     pytest tests/, or pytest ARGS...
#   bash launch.sh setup              only set up
#
# `prepare encode`, `generate --lines` and `evaluate` also use every GPU of this node.
# Several nodes: the same line on each, with NNODES, NODE_RANK and MASTER_ADDR set, and an output folder that all of them see.
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
TOOLS="prepare generate evaluate export merge average show plan report replay demo"

fail() {
    echo "error: $1" >&2
    exit 2
}

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
    BENCHMARK=${1:-}
    [ -f "$ROOT/benchmarks/$BENCHMARK.py" ] ||
        fail "no benchmark '$BENCHMARK'; there are: $(cd "$ROOT/benchmarks" && echo *.py | sed 's/\.py//g')"
    shift
fi

# ---- environment ------------------------------------------------------------------------------------------------------
setup() { # stamp, requirements...
    # The stamp names what was installed: while it fits, nothing is done and no network is used.
    local stamp=$VENV/$1 wanted
    shift
    wanted=$(cat "$@" | cksum)
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    mkdir -p "$(dirname "$VENV")"
    exec 9>"$VENV.lock" # nodes may share this folder
    ! command -v flock >/dev/null || flock 9 || echo "note: no locks on this file system; set up on one node first" >&2
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    echo "setting up $VENV" >&2
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    local install=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${install[@]}" ${LOCK:+-c "$LOCK"} "${@/#/--requirement=}"
    [ "$stamp" != "$VENV/.installed" ] || "${install[@]}" --no-deps boson-multimodal==0.1.1
    echo "$wanted" >"$stamp"
    exec 9>&-
}

quantized_by_file() { # --quantize if a file that --config names says so
    while [ $# -gt 0 ]; do
        case "$1" in --config) cat -- "${2:-}" ;; --config=*) cat -- "${1#*=}" ;; esac
        shift
    done 2>/dev/null | sed -n 's/^ *"\{0,1\}quantize"\{0,1\}: *"\{0,1\}nf4.*/--quantize/p'
}

num_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

GPUS=$(num_gpus)
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

on_every_gpu() { # file, arguments...
    if [ "$NPROC" -gt 1 ]; then on_ranks --standalone "$@"; else exec "$PY" "$@"; fi
}

case "$COMMAND ${1:-}" in
setup*) exit 0 ;;
test*) cd "$ROOT" && exec "$PY" -m pytest "${@:-tests/}" ;;
bench*) exec "$PY" "$ROOT/benchmarks/$BENCHMARK.py" "$@" ;;
train*) ;;
"prepare encode") on_every_gpu "$ROOT/prepare/__main__.py" "$@" ;;
prepare*) exec "$PY" "$ROOT/prepare/__main__.py" "$@" ;;
generate*) case " $* " in
    *" --lines"[=\ ]*) on_every_gpu "$ROOT/generate/__main__.py" "$@" ;; # one text needs one rank
    *) exec "$PY" "$ROOT/generate/__main__.py" "$@" ;;
    esac ;;
evaluate*) on_every_gpu "$ROOT/generate/evaluate.py" "$@" ;;
export* | merge* | average* | show*) exec "$PY" "$ROOT/export/__main__.py" "$COMMAND" "$@" ;;
*) exec "$PY" "$ROOT/tools/$COMMAND.py" "$@" ;;
esac

# ---- train ------------------------------------------------------------------------------------------------------------
ARGS=()
for name in $SETTINGS; do
    variable=$(tr '[:lower:]' '[:upper:]' <<<"$name")
    [ -z "${!variable:-}" ] || ARGS+=("--$name" "${!variable}")
done
ARGS+=("$@")

export NCCL_IB_DISABLE=${NCCL_IB_DISABLE:-0} NCCL_P2P_DISABLE=${NCCL_P2P_DISABLE:-0}
if [ -z "${PYTORCH_ALLOC_CONF:-}" ]; then
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi

if [ "$NNODES" = 1 ]; then
    RENDEZVOUS=(--standalone)
else
    RENDEZVOUS=(--rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv_id="higgs-$MASTER_PORT"
        --rdzv_conf="is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)")
fi
on_ranks --nnodes="$NNODES" --max_restarts="$MAX_RESTARTS" "${RENDEZVOUS[@]}" "$ROOT/train.py" "${ARGS[@]}"
