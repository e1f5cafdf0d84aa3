#!/usr/bin/env bash
# The test split through a Stage1 model: SAVE_DIR/RUN_NAME/{images,grids}/ and metrics.json.
set -euo pipefail
usage() {
  echo "usage: $0 SAVE_DIR CKPT CONFIG WORLD_SIZE RUN_NAME [RESUME_CKPT] [RESUME_WANDB_ID] [-- --key value ...]" >&2
  exit 2
}
args=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do args+=("$1"); shift; done
[ "${1:-}" = "--" ] && shift
[ ${#args[@]} -ge 5 ] && [ ${#args[@]} -le 7 ] || usage
resume=()
[ -n "${args[5]:-}" ] && resume+=(--resume-ckpt "${args[5]}")
[ -n "${args[6]:-}" ] && resume+=(--resume-wandb-id "${args[6]}")
[ -n "${args[1]}" ] && resume+=(--ckpt "${args[1]}")
here=$(cd "$(dirname "$0")" && pwd)
python=python
[ -x "$here/.venv/bin/python" ] && python="$here/.venv/bin/python"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m rqvae recon --save-dir "${args[0]}" --world-size "${args[3]}" \
  --run-name "${args[4]}" "${resume[@]}" "${args[2]}" "$@"
