"""What torch_xla's own counters say after each step of a run; for processes that tests start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rqvae.callbacks.interfaces import Observer, RunView


class XlaCounters(Observer):
    """Writes, after each step: step, programs compiled, programs run; at the end the operations left to the host."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.rows: list[tuple[int, int, int]] = []

    def after_step(self, run: RunView, losses: Mapping[str, Tensor]) -> None:
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.debug.metrics as metrics

        # a program is counted at its end; only this replica's, since to wait for the others' would hold their devices
        xm.wait_device_ops(xm.xla_real_devices([str(torch_xla.device())]))
        names = ("CompileTime", "ExecuteTime", "ExecuteReplicatedTime")  # the last is SPMD's
        compiled, executed, split = ((metrics.metric_data(name) or (0,))[0] for name in names)
        self.rows.append((run.clock.step, compiled, executed + split))

    def on_fit_end(self, run: RunView) -> None:
        import torch_xla.debug.metrics as metrics

        if run.is_main:
            names = [name for name in metrics.counter_names() if name.startswith("aten::")]
            self.file.write_text(json.dumps({"steps": self.rows, "fallbacks": names}))
