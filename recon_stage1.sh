#!/usr/bin/env bash
# The test split through a Stage1 model: SAVE_DIR/RUN_NAME/{images,grids}/ and metrics.json.
here=$(cd "$(dirname "$0")" && pwd)
python=python
[ -x "$here/.venv/bin/python" ] && python="$here/.venv/bin/python"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m rqvae.scripts "$0" "$@"
