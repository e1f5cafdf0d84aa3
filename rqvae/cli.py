"""The command line: finds the command, and turns what it raises into one line and an exit code.

Exit codes: 0 done, 1 a gate that was asked for failed, 2 bad input, 3 the run failed, 130/143 interrupted after a
checkpoint.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rqvae.commands import COMMANDS
from rqvae.errors import BadInput, RunFailed

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:16s} {line}" for name, line in COMMANDS.items()]
        listing = "\n".join(lines)
        sys.stdout.write(f"usage: python -m rqvae COMMAND ... (COMMAND --help tells more)\n\n{listing}\n")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command {name}; expected one of {', '.join(COMMANDS)}", 2)
    try:
        return import_module(f"rqvae.commands.{name.replace('-', '_')}").run(rest)
    except BadInput as error:
        return _fail(str(error), 2)
    except RunFailed as error:
        return _fail(str(error), 3)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        if error.errno not in _FULL:
            traceback.print_exc()
            return _fail(str(error), 3)
        return _fail(f"{error.filename or 'the run'}: the disk is full; what was written before is untouched", 3)
    except Exception as error:  # noqa: BLE001  (a defect of ours: shown whole, and the code says that the run failed)
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}", 3)


def _fail(message: str, code: int) -> int:
    """Say why, once: a rank of our launcher leaves the words to it."""
    line = " ".join(message.split())
    if folder := os.environ.get("RQVAE_ERROR_DIR"):
        Path(folder, f"rank_{os.environ.get('RANK', '0')}").write_text(f"{code} {line}")
    else:
        sys.stderr.write(f"error: {line}\n")
    return code
