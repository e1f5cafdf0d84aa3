"""`python -m rqvae COMMAND`, also installed as `rqvae`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Spinning OpenMP threads make a step 10 x slower when the cores are shared; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rqvae.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
