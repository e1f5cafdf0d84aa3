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


WANTED: dict[str, tuple[str, ...]] = {
    "param_change": ("train/param_change_GROUP",),
    "update_ratio": ("train/update_ratio",),
    "dead_units": ("train/dead_units",),
    "attention_entropy": ("train/attn_entropy",),
    "grad_noise_scale": ("train/grad_noise_scale",),
    "latent_std": ("train/latent_std",),
    "latent_mean": ("train/latent_mean",),
    "latent_psnr": ("val/roundtrip_psnr",),
    "eval_trend": ("val/loss",),
    "ema_eval": ("val/loss", "val/ema_loss"),
    "mask_probe": ("val/loss_mask_right", "val/loss_mask_shuffled"),
    "memory": ("train/gpu_mem",),
    "data_wait": ("train/data_wait",),
    "timestep_draws": ("draw/timestep",),
    "draws": ("draw/class",),
    "images": ("image/std",),
    "pixels": ("pixels/class_K",),
    "input_range": ("input/low", "input/high"),
    "conditions": ("condition/classes_train", "condition/classes_sampling"),
}
"""Needs that no run of ours meets by itself, and the names under which an observer logs what they ask for."""
OBSERVER = """import torch
from torch.nn.utils import parameters_to_vector

from rqvae.callbacks.interfaces import Observer, RunView, UpdateView


class Moved(Observer):
    \"""Logs how far each part of a model has moved since the look before.\"""

    def __init__(self, every: int = 50) -> None:
        self.every, self.before = every, dict[str, torch.Tensor]()

    def after_backward(self, run: RunView, update: UpdateView) -> None:
        if run.clock.step % self.every:
            return
        for name, part in update.module.named_children():
            if weights := list(part.parameters()):
                now = parameters_to_vector(weights).detach().clone()
                if name in self.before:
                    run.log_scalars({f"train/param_change_{name}": torch.dist(now, self.before[name])})
                self.before[name] = now
"""
_SPELLING = """## Other names for the same

Lists elsewhere call three of these checks otherwise: EVAL.FID_RISING is EVAL.SCORE_RISING here (it judges KID, WER and
others too), EVAL.MASK_IGNORED is COND.MASK_IGNORED, and LOG.MISSING_EVAL is EVAL.MISSING.
"""


def _own_values() -> str:
    """What to log so that the remaining checks can look at a run of ours, and how."""
    rows = []
    for need, names in WANTED.items():
        ids = ", ".join(check.id for check in all_checks() if need in check.needs)
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {NEEDS[need][1]} | {ids} |")
    return f"""## What a run of ours does not log by itself

Loss, gradient norm, learning rate, loss scale, epoch, time, speed and scores are in every row or come with
`online_eval`; losses by diffusion time and class come with the observer `Health`. These checks ask for more:

| log | that is | read by |
|---|---|---|
{chr(10).join(rows)}

An observer logs it: a file of your own, say `moved.py`, and one line of the config. See
[extending](extending.md) for where the file is looked for.

```python
# moved.py
{OBSERVER}```

```yaml
observers: [{{class_path: moved.Moved, init_args: {{every: 50}}}}, {{class_path: rqvae.callbacks.health.Health}}]
```

`after_loss` has the batch and its losses, `after_backward` the module and its gradients, and a probe on held-out data
(`val/loss_mask_shuffled`: the same batch, noise and times with the conditions of other samples) belongs into
`after_step`, every some hundred steps. Leave tensors on the device: they are read with the row.
"""


def page() -> str:
    """The whole page."""
    lines = [_INTRO.format(formats=", ".join(f"`{reader.name}`" for reader in readers())), _own_values(), _SPELLING]
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
