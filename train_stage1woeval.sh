#!/usr/bin/env bash
# Train a Stage1 model without evaluation while it trains.
set -euo pipefail
usage() {
  echo "usage: $0 PROJECT SAVE_DIR CONFIG WORLD_SIZE RUN_NAME [RESUME_CKPT] [RESUME_WANDB_ID] [-- --key value ...]" >&2
  exit 2
}
args=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do args+=("$1"); shift; done
[ "${1:-}" = "--" ] && shift
[ ${#args[@]} -ge 5 ] && [ ${#args[@]} -le 7 ] || usage
resume=()
[ -n "${args[5]:-}" ] && resume+=(--resume-ckpt "${args[5]}")
[ -n "${args[6]:-}" ] && resume+=(--resume-wandb-id "${args[6]}")
here=$(cd "$(dirname "$0")" && pwd)
python=python
[ -x "$here/.venv/bin/python" ] && python="$here/.venv/bin/python"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m rqvae train --stage 1 --do_online_eval False --project "${args[0]}" --save-dir "${args[1]}" \
  --world-size "${args[3]}" --run-name "${args[4]}" "${resume[@]}" "${args[2]}" "$@"
