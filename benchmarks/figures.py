"""`python -m benchmarks.figures ISSUE`: repeat the figures that belong to an issue of the project's tracker."""

from __future__ import annotations

import os
import subprocess
import sys

FIGURES: dict[str, list[list[str]]] = {
    "3": [["demo_scores"], ["trainer_overhead"], ["dit_step", "--peer", os.environ.get("DIT", "DiT")], ["code_size"]],
    "4": [["dit_compile", "--peer", os.environ.get("DIT", "DiT")]],
    "5": [["ddp_overhead"]],
    "6": [["fid_distance"], ["fid_memory"], ["fid_extraction"], ["fid_resize"], ["fid_jackknife"]],
    "7": [
        ["play_speed", "--model", "maze-chase"],
        ["maze_chase_scores"],
        ["world_workflows", "--steps", "300"],
        ["ms_pacman"],
    ],
    "8": [["vae_diagnostic"], ["vae_diagnostic_pipeline"], ["vae_diagnostic_runs"]],
    "9": [["channel_tracking"]],
    "10": [["pathology"]],
    "11": [
        ["health_faults", "--keep", "build/health_runs"],
        ["health_detection", "--list", os.environ.get("HEALTHY", "benchmarks/healthy_runs.txt")],
        ["health_live"],
    ],
}


def main() -> None:
    issue = sys.argv[1] if len(sys.argv) > 1 else ""
    if issue not in FIGURES:
        sys.exit(f"usage: make figures ISSUE=n, n one of {', '.join(FIGURES)}; got {issue!r}")
    for name, *arguments in FIGURES[issue]:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=True)


if __name__ == "__main__":
    main()
