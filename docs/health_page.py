"""docs/health.md: every check as it is declared, with what it says about a log that has its fault."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rqvae.health.checks import all_checks
from rqvae.health.examine import Examination
from rqvae.health.finding import SEVERITIES, Check
from rqvae.health.needs import NEEDS
from rqvae.health.readers import readers
from tests.health_cases import CASES, examined_case
from tests.health_sources import examined

FAMILIES = {
    "NUM": "Numbers",
    "LOSS": "The course of the loss",
    "DIFF": "Diffusion",
    "SCALE": "Scale of the loss",
    "LATENT": "Latents",
    "VAE": "The autoencoder",
    "NORM": "Normalisation in the source",
    "COND": "Conditions",
    "GRAD": "Gradients",
    "OPT": "Optimizer and schedule",
    "PARAM": "Weights",
    "EMA": "Averages of weights",
    "GEN": "Generalisation",
    "EVAL": "Evaluation",
    "GAN": "Two networks that play",
    "DATA": "Data",
    "RUN": "The run",
    "PERF": "Speed",
    "LOG": "The log itself",
}
_INTRO = """# Training health

```
python -m rqvae health LOG|RUN_DIR [--config C] [--source DIR] [--baseline OTHER]
                       [--html OUT] [--json OUT] [--md OUT] [--format F] [--fail-on SEVERITY]
```

What an experienced colleague would say about a run, from its log: findings with the lines they rest on, how sure they
are, what else it could be, what to do, and how to see that it helped. The format is found out; `--format` names one,
or the class path of a reader of your own (a class with `name`, `files`, `sniff(path, head)` and `read(path)`; see
`rqvae/health/readers/dit.py`). Exit codes: 0, 1 where a finding reaches `--fail-on` (critical by default), 2 bad
input. Neither torch nor a plotting library is loaded.

Formats: {formats}.

Severities: critical (stop), major (the result is not valid, or compute is wasted), minor (look at it), info. A check
whose needs are not met is listed as not assessed, with what to log next time; one that looked and found nothing is
listed with what its points could have shown. `--config` (YAML or JSON) and `--source` (a folder of Python files,
parsed and never run) let the checks compare log, config and code; names in the code do not matter, its shape does.

A loss is judged by medians of blocks, long enough that a block is known to 3 %, or by two long stretches where noise
is larger: single steps of a diffusion differ by ten times from the timestep alone. Levels are compared with the
lowest one that was *held* over a fifth of the run; the lowest single block would be biased by noise, and every long
run would seem to rise. Losses of a GAN need not fall and are judged by their own two checks.

## While a run trains

```yaml
observers: [{{class_path: rqvae.callbacks.health.Health, init_args: {{every: 500 steps}}}}]            # warns
interventions: [{{class_path: rqvae.callbacks.health.HealthGuard, init_args: {{stop: critical}}}}]     # acts
train: {{skip_nonfinite: 2, skip_spikes: 10}}  # leaves out a step as it happens
```

The observer examines the run's own log in a process of its own and writes what is new as warnings to `log.txt`, and
every look to `health.jsonl`. It adds the loss by diffusion time and by class to the rows, from sums that stay on the
device between rows. The guard also has all ranks write a checkpoint (`checkpoint: major`) or end with exit code 3
(`stop: critical`), in the same step. `python -m rqvae health replay RUN_DIR` repeats every look from the files: the
same findings, or exit code 1.

How often this cries wolf and what it misses is measured: `python -m benchmarks.health_detection --healthy LOG ...` (on
logs that somebody else calls healthy) and `python -m benchmarks.health_faults`; what the observer costs a step:
`python -m benchmarks.health_live`. Figures under `benchmarks/results/`.
"""


def page() -> str:
    """The whole page."""
    lines = [_INTRO.format(formats=", ".join(f"`{reader.name}`" for reader in readers()))]
    with tempfile.TemporaryDirectory() as folder:
        from_source = examined(Path(folder))
        for prefix, title in FAMILIES.items():
            family = [check for check in all_checks() if check.id.partition(".")[0] == prefix]
            lines += [f"## {title}", ""]
            for check in sorted(family, key=lambda c: (-SEVERITIES.index(c.severity), c.id)):
                lines += _check(check, from_source, Path(folder))
    return "\n".join(lines).rstrip() + "\n"


def _check(check: Check, from_source: Examination, folder: Path) -> list[str]:
    needs = [NEEDS[need][1].removeprefix("nothing more: ") for need in check.needs if need != "minimised"]
    rows = [("Fires when", [check.threshold]), ("Needs", needs), ("Could also be", list(check.alternatives))]
    rows += [("Do", list(check.recommendation)), ("Then", [check.verify]), ("Source", [check.source])]
    lines = [f"### {check.id}", "", f"{check.title[:1].upper()}{check.title[1:]}; {check.severity}.", ""]
    lines += [f"- {name}: {'; '.join(texts)}." for name, texts in rows if texts and texts[0]]
    example = _example(check, from_source, folder)
    return [*lines, *([f"- Example: *{example}*"] if example else []), ""]


def _example(check: Check, from_source: Examination, folder: Path) -> str:
    examinations = [from_source]
    if check.id in CASES:
        examinations.insert(0, examined_case(folder, CASES[check.id][0]))
    for examination in examinations:
        for finding in examination.findings:
            if finding.check.id == check.id:
                return finding.found.message.replace("*", "\\*").replace("_", "\\_").replace("`", "")
    return ""
