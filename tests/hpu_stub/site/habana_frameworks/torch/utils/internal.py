"""The mode in which the package was imported."""

import os

_LAZY = os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"


def is_lazy():
    return _LAZY
