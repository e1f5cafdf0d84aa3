#!/usr/bin/env bash
# Train a Stage2 model on the latents of a Stage1 checkpoint.
here=$(cd "$(dirname "$0")" && pwd)
python=python
[ -x "$here/.venv/bin/python" ] && python="$here/.venv/bin/python"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m rqvae.scripts "$0" "$@"
