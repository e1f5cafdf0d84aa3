#!/usr/bin/env bash
# Train a Stage1 model, scored on the validation split while it trains.
here=$(cd "$(dirname "$0")" && pwd)
python=python
[ -x "$here/.venv/bin/python" ] && python="$here/.venv/bin/python"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m rqvae.scripts "$0" "$@"
