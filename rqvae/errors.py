"""The two ways a command ends badly. A leaf: every room may import it, it imports none."""

from __future__ import annotations


class BadInput(ValueError):
    """Something the user gave is wrong (exit code 2).

    The message is one line that names the file, the key or the tensor, what was expected and what came.
    """


class RunFailed(RuntimeError):
    """The run itself failed: not finite, disk full, lost worker (exit code 3). The message is one line."""
