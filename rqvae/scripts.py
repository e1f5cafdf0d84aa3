"""The four shell scripts' arguments, in the order that their users know, turned into a command.

python -m rqvae.scripts train_stage1.sh PROJECT SAVE_DIR CONFIG WORLD_SIZE RUN_NAME [RESUME_CKPT] [RESUME_WANDB_ID]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

TRAIN = ("PROJECT", "SAVE_DIR", "CONFIG", "WORLD_SIZE", "RUN_NAME")
RECON = ("SAVE_DIR", "CKPT", "CONFIG", "WORLD_SIZE", "RUN_NAME")
OPTIONAL = ("RESUME_CKPT", "RESUME_WANDB_ID")
COMMANDS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "train_stage1.sh": (TRAIN, ["train", "--stage", "1", "--do-online-eval", "True"]),
    "train_stage1woeval.sh": (TRAIN, ["train", "--stage", "1", "--do-online-eval", "False"]),
    "train_stage2.sh": (TRAIN, ["train", "--stage", "2"]),
    "recon_stage1.sh": (RECON, ["recon"]),
}


def translate(script: str, arguments: Sequence[str]) -> list[str] | None:
    """Arguments of `python -m rqvae`, or None where they are not the script's.

    Args:
        script: name of the script.
        arguments: five to seven, and after `--` overrides of config keys.
    """
    names, command = COMMANDS[script]
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given, overrides = arguments[:cut], arguments[cut + 1 :]
    if not len(names) <= len(given) <= len(names) + len(OPTIONAL) or any(a.startswith("--") for a in given):
        return None
    values = dict(zip((*names, *OPTIONAL), given, strict=False))
    if not values["WORLD_SIZE"].lstrip("-").isdigit():
        return None
    options = {name: value for name, value in values.items() if name != "CONFIG" and value}
    flags = [word for name, value in options.items() for word in (f"--{name.lower().replace('_', '-')}", value)]
    return [*command, *flags, values["CONFIG"], *overrides]


def main() -> None:
    """Run a script's command, or print its usage and exit with 2."""
    script, *arguments = sys.argv[1:]
    script = os.path.basename(script)
    command = translate(script, arguments)
    if command is None:
        places = " ".join((*COMMANDS[script][0], *(f"[{name}]" for name in OPTIONAL)))
        sys.stderr.write(f"usage: ./{script} {places} [-- --key value ...]\n")
        sys.exit(2)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rqvae.cli import run

    sys.exit(run(command))


if __name__ == "__main__":
    main()
