"""What a training run on Gaudi must do in which order, as the vendor documents it. `broken_rules` reads a journal.

SETUP, with the page that says it (all below https://docs.habana.ai/en/latest/PyTorch/):

1. The mode is set before the package is imported: PyTorch_Gaudi_Theory_of_Operations.html, "Execution Modes".
2. The package before the device is used: Getting_Started_with_PyTorch_and_Gaudi/Getting_Started_with_PyTorch.html.
3. `initialize_distributed_hpu`, then `init_process_group("hccl")`, then the model on the device, then DDP:
   PyTorch_Scaling_Guide/Distributed_Backend_Initialization.html, and HabanaAI/Model-References, torchvision/train.py.

STEP:

4. Forward and loss under `torch.autocast("hpu", torch.bfloat16)`, backward outside: PyTorch_Mixed_Precision/index.html.
5. Lazy mode: `mark_step` after `loss.backward()` and after `optimizer.step()` (Getting_Started_with_PyTorch.html, the
   example of lazy mode), and wherever else work is to be launched (Reference/mark_step.html): here, after the averages.
   Eager mode has none.
6. Gradients are reduced in the last backward of a step alone (torch.nn.parallel.DistributedDataParallel.no_sync), then
   clipped, then applied: what is clipped is the mean.
7. No float64 on the device: Reference/PyTorch_Support_Matrix.html, "Data Types".
8. Nothing in a step waits for the device: no `synchronize`, no value read.
9. Fused operations where asked for: Model_Optimization_PyTorch/Custom_Ops_PyTorch.html.
"""

from __future__ import annotations

AUTOCAST = "autocast hpu torch.bfloat16 True"


def first(events: list[str], start: str) -> int:
    """Where the first event that begins so is; beyond the end where there is none."""
    return next((i for i, event in enumerate(events) if event.startswith(start)), len(events))


def steps(events: list[str]) -> list[list[str]]:
    """The events of each optimizer step."""
    found: list[list[str]] = []
    for event in events:
        if event == "step":
            found.append([])
        elif found:
            found[-1].append(event)
    return found


def updates(step: list[str]) -> list[list[str]]:
    """The events of each update in a step, up to its optimizer's."""
    parts: list[list[str]] = [[]]
    for event in step:
        parts[-1].append(event)
        if event == "optimizer":
            parts.append([])
    return parts[:-1]


def broken_setup(events: list[str], lazy: bool, compiled: bool) -> list[str]:
    order = [f"import core, mode {int(lazy)}", "initialize_distributed_hpu", "init_process_group hccl", "to device"]
    order += ["compile hpu_backend"] if compiled else []
    order += ["ddp", "autocast"]
    places = [first(events, name) for name in order]
    broken = [f"setup: no {name}" for name, place in zip(order, places, strict=True) if place == len(events)]
    pairs = zip(order, order[1:], places, places[1:], strict=False)
    return broken + [f"setup: {b} before {a}" for a, b, at, then in pairs if then < at]


def broken_update(update: list[str], accumulate: int, fused: bool) -> list[str]:
    broken = []
    backwards = [i for i, event in enumerate(update) if event == "backward"]
    reduces = [i for i, event in enumerate(update) if event == "reduce"]
    clips = [i for i, event in enumerate(update) if event.startswith("clip")]
    if len(backwards) != accumulate:
        return [f"update: {len(backwards)} backwards, expected {accumulate}"]
    if not reduces:
        broken.append("reduce: never")
    elif accumulate > 1 and reduces[0] < backwards[-2]:
        broken.append("reduce: before the last backward")
    if len(clips) != 1 or not backwards[-1] < clips[0]:
        broken.append("clip: not once, after the last backward and before the optimizer")
    if ("clip FusedClipNorm" in update) != fused:
        broken.append("fused: clip")
    for since, at in zip([0, *(i + 1 for i in backwards)], backwards, strict=False):
        if [update[since:at].count(event) for event in (AUTOCAST, "left autocast")] != [1, 1]:
            broken.append("autocast: not around forward and loss alone")
    return broken


def broken_marks(step: list[str], lazy: bool) -> list[str]:
    if not lazy:
        return ["mark_step: in eager mode"] if "mark_step" in step else []
    watched = ("mark_step", "backward", "optimizer", "ema", "autocast", "clip", "end")
    seen = [event for event in step if event.startswith(watched)]
    pairs = [(a, b) for a, b in zip(seen, seen[1:], strict=False) if a != b]
    return [
        f"mark_step: none after {a}" for a, b in pairs if a in ("backward", "optimizer", "ema") and b != "mark_step"
    ]


def broken_rules(events: list[str], *, lazy: bool, fused: bool, compiled: bool, accumulate: int, of: int) -> list[str]:
    """The rules that a rank's journal breaks, by name; none for a run that keeps the contract.

    Args:
        events: of one training run.
        lazy: mode that was asked for.
        fused: whether the vendor's fused operations were asked for.
        compiled: whether `train.compile` was.
        accumulate: micro-batches of a step.
        of: how many steps it had.
    """
    broken = broken_setup(events, lazy, compiled)
    parts = steps(events)
    if len(parts) != of or not all(updates(step) for step in parts):
        broken.append("steps: not as many as asked for")
    if ("FusedAdamW" in events) != fused:
        broken.append("fused: optimizer")
    for step in parts:
        broken += broken_marks(step, lazy)
        for update in updates(step):
            broken += broken_update(update, accumulate, fused)
        broken += [f"waits: {event}" for event in step if event in ("synchronize", "host_read")]
    broken += [event for event in events if event.startswith("float64")]
    return list(dict.fromkeys(broken))
