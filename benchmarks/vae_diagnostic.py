"""The compile diagnostic against the exhaustive procedure: graphs, processor seconds, decodes.

The exhaustive procedure is `--search naive`: for each unit torch's compiled code is forgotten, the unit is compiled and
the whole decoder decodes. It is measured on units drawn at random and scaled to all of them. Inductor's caches are off.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
import torch._inductor.config

from benchmarks.record import save
from rqvae.backends.compilers import cpu_seconds
from rqvae.diagnostics.compilers import TorchCompiler
from rqvae.diagnostics.session import Diagnosis
from rqvae.diagnostics.subjects import RandomDecoder, Request
from rqvae.diagnostics.units import ROOT


class Silent:
    def begin(self, path: str) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...


def measure(
    subject: Any, compiler: str, search: Any, paths: list[str]
) -> tuple[Diagnosis, list[dict[str, Any]], float]:
    started = cpu_seconds()
    with Diagnosis(subject, TorchCompiler(compiler)) as diagnosis:
        rows = diagnosis.single(paths, {}, search, Silent())
    return diagnosis, rows, cpu_seconds() - started


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="random-sdxl", choices=("random-sdxl", "random-small"))
    options.add_argument("--compiler", default="inductor")
    options.add_argument("--latent-size", type=int, default=16)
    options.add_argument("--naive", type=int, default=12, help="units of the exhaustive procedure; 0 leaves it out")
    given = options.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    subject = RandomDecoder(given.model).subject(Request(latent_size=given.latent_size))
    with Diagnosis(subject, TorchCompiler("eager")) as diagnosis:
        units = [path for path in diagnosis.survey.order if path != ROOT]
    drawn = random.Random(0).sample(units, min(given.naive, len(units)))
    # the compiler's own warm-up is in neither figure
    measure(subject, given.compiler, "shadow", units[:1])
    shadow, rows, shadow_seconds = measure(subject, given.compiler, "shadow", units)
    statuses = [row["status"] for row in rows]
    figures: dict[str, Any] = {
        "units": len(units),
        "graphs": len(shadow.ledger.graphs),
        "decodes": shadow.decodes,
        "bad": [row["path"] for row in rows if row["status"] != "OK"],
        "ok": statuses.count("OK"),
        "least_backend_calls_of_ok": min((row["backend_calls"] for row in rows if row["status"] == "OK"), default=None),
        "shadow_cpu_seconds": round(shadow_seconds, 1),
    }
    if drawn:
        _, _, naive_seconds = measure(subject, given.compiler, "naive", drawn)
        whole = naive_seconds * len(units) / len(drawn)
        figures |= {"naive_units_measured": len(drawn), "naive_cpu_seconds_scaled": round(whole, 1)}
        figures["ratio"] = round(shadow_seconds / whole, 3)
    save("vae_diagnostic", figures)


if __name__ == "__main__":
    main()
