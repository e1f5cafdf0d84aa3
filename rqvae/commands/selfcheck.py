"""Check on this machine that a backend computes, communicates and compiles as it should."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rqvae.commands.options import Parser, check_world_size, thread_count


def parser() -> Parser:
    """The options of this command."""
    own = Parser("rqvae selfcheck", description=__doc__)
    own.add_argument("backend", metavar="BACKEND", help="as --backend of train: cpu, cuda ...")
    own.add_argument("--world-size", type=int, default=1, help="processes on this host")
    own.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON, to be pasted into an issue")
    own.add_argument("--threads", type=thread_count, default=0, help="OpenMP threads of a process")
    return own


def run(arguments: Sequence[str]) -> int:
    """Check a backend; 1 where a check fails."""
    options = parser().parse_args(list(arguments))

    from rich.console import Console
    from rich.table import Table

    from rqvae import backends
    from rqvae.trainers.run_folder import make_folder

    world_size = check_world_size(options)
    backend_name = backends.choose(options.backend)
    if not backends.in_job():
        if options.json:
            make_folder(options.json.parent, "--json")
        if backends.needs_launch(world_size):
            command = ["selfcheck", *arguments]
            return backends.launch(command, world_size, threads=options.threads, backend=options.backend)
    backend = backends.create(backend_name, threads=options.threads)

    # after the backend: a vendor's runtime has to be there before the first backward pass
    from rqvae.backends.selfcheck import as_json, check_backend

    try:
        checks = check_backend(backend)
    finally:
        backend.close()
    if backend.rank == 0:
        table = Table("", "check", "value", "limit", title=f"{backend.device_name}, world size {backend.world_size}")
        for check in checks:
            limit = "" if check.limit is None else f"{check.limit:g}"
            table.add_row("ok" if check.ok else "FAILED", check.name, f"{check.value:.6g}", limit)
        Console().print(table)
        if options.json:
            options.json.write_text(json.dumps(as_json(backend, checks), indent=1) + "\n")
    return 0 if all(check.ok for check in checks) else 1
