"""`python -m rqvae COMMAND`, also installed as `rqvae`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Spinning OpenMP threads make a step 10 x slower when the cores are shared; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # `python -m` looks for modules in the current folder; the installed script must too, for parts that live there.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    from rqvae.cli import run
    from rqvae.processes import end

    end(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
