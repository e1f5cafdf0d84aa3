"""A log with the fault of each check, and the same log repaired."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rqvae.health.examine import Examination
from tests.health_logs import built, healthy, judged

N = 300
STEPS, LOSS = healthy(N)
RNG = np.random.default_rng(1)
FLAT = 0.15 * np.exp(0.02 * RNG.standard_normal(N))
EPOCHS = np.arange(N) / 30
DIFFUSION = {"timesteps": 1000, "objective": "pred_noise"}


@dataclass
class Log:
    """Arguments of a log in memory, and of its examination."""

    series: dict[str, Any] = field(default_factory=lambda: {"loss": LOSS})
    facts: dict[str, object] = field(default_factory=dict)
    events: tuple[tuple[str, str], ...] = ()
    config: dict[str, object] = field(default_factory=dict)
    form: str = "guided-csv"
    baseline: np.ndarray | None = None


def at_end(values: np.ndarray, last: int, new: Any) -> np.ndarray:
    out = values.copy()
    out[-last:] = new
    return out


def stairs(drop: float) -> np.ndarray:
    return np.exp(-drop * np.floor(EPOCHS)) * (1 + 0.005 * RNG.standard_normal(N))


def cosine(total: float) -> np.ndarray:
    return 1e-4 * 0.5 * (1 + np.cos(np.pi * STEPS / total))


def held_out(*values: float) -> tuple[np.ndarray, list[float]]:
    return np.linspace(STEPS[20], STEPS[-1], len(values)), list(values)


DRAWS = {
    "Individual probabilities": "[0.5, 0.125, 0.125, 0.125, 0.125]",
    "Number of classes": 5,
}
EVEN = np.tile([0, 0, 0, 0, 1, 2, 3, 4], 20)
CASES: dict[str, tuple[Log, Log]] = {
    "NUM.NONFINITE": (Log({"loss": at_end(LOSS, 3, np.nan)}), Log()),
    "RUN.CONTINUED_AFTER_NAN": (Log({"loss": at_end(LOSS, 9, np.nan)}), Log({"loss": at_end(LOSS, 1, np.nan)})),
    "NUM.VALUES_REPLACED": (
        Log({"loss": LOSS, "skipped_steps": at_end(np.zeros(N), 2, 1)}),
        Log({"loss": LOSS, "skipped_steps": np.zeros(N)}),
    ),
    "NUM.LOSS_SCALE_COLLAPSE": (
        Log({"loss": LOSS, "loss_scale": 65536 / 2.0 ** np.clip(np.arange(N) - 250, 0, 14)}),
        Log({"loss": LOSS, "loss_scale": np.full(N, 65536.0)}),
    ),
    "LOSS.DIVERGED": (Log({"loss": at_end(LOSS, 60, 2 * LOSS[-60:])}), Log()),
    "LOSS.SPIKE_RECOVERED": (
        Log({"loss": np.where((np.arange(N) > 200) & (np.arange(N) < 206), 6 * LOSS, LOSS)}),
        Log(),
    ),
    "LOSS.SPIKE_RATE": (Log({"loss": np.where(np.arange(N) % 30 >= 26, 6 * LOSS, LOSS)}), Log()),
    "LOSS.DRIFT_UP": (
        Log({"loss": FLAT * (1 + 0.17 * np.maximum(np.arange(N) / N - 0.5, 0) * 2)}),
        Log({"loss": FLAT}),
    ),
    "LOSS.NOT_DECREASING": (Log({"loss": FLAT}), Log()),
    "LOSS.PLATEAU": (
        Log({"loss": np.where(np.arange(N) < 60, LOSS + 1, FLAT)}),
        Log({"loss": LOSS * 0.995 ** np.arange(N)}),
    ),
    "LOSS.BASELINE_WORSE": (Log({"loss": 1.5 * LOSS}, baseline=LOSS), Log(baseline=LOSS)),
    "DIFF.TRIVIAL_PREDICTOR": (
        Log({"loss": at_end(LOSS, 30, 1 + 0.01 * RNG.standard_normal(30))}, DIFFUSION),
        Log({"loss": LOSS}, DIFFUSION),
    ),
    "DIFF.INIT_LEVEL": (
        Log({"loss": (np.arange(1, 101.0), 9 / np.arange(1, 101.0) + 1)}, DIFFUSION),
        Log({"loss": (np.arange(1, 101.0), 1 / np.arange(1, 101.0) ** 0.2)}, DIFFUSION),
    ),
    "DIFF.BIN_DOMINANCE": (
        Log({"loss": LOSS, "loss_q0": 40 * LOSS, "loss_q1": LOSS, "loss_q2": LOSS}),
        Log({"loss": LOSS, "loss_q0": 4 * LOSS, "loss_q1": LOSS, "loss_q2": LOSS}),
    ),
    "DIFF.BIN_REGRESSION": (
        Log({"loss": LOSS, "loss_q0": LOSS, "loss_q1": at_end(0.1 * LOSS, 80, 0.05)}),
        Log({"loss": LOSS, "loss_q0": LOSS, "loss_q1": 0.1 * LOSS}),
    ),
    "DIFF.T_COVERAGE": (
        Log({"loss": LOSS, "draw/timestep": np.arange(200) % 100}, DIFFUSION),
        Log({"loss": LOSS, "draw/timestep": (np.arange(200) * 617) % 1000}, DIFFUSION),
    ),
    "DIFF.STEPS_DIFFER": (
        Log(facts={**DIFFUSION, "sampling_timesteps": 2000}),
        Log(facts={**DIFFUSION, "sampling_timesteps": 250}),
    ),
    "SCALE.LOSS_ABSURD": (Log({"loss": 5000 * LOSS}, DIFFUSION), Log({"loss": LOSS}, DIFFUSION)),
    "LATENT.SCALE": (Log({"loss": LOSS, "latent_std": [9.0, 9.1]}), Log({"loss": LOSS, "latent_std": [1.0, 1.1]})),
    "LATENT.SHIFT": (Log({"loss": LOSS, "latent_mean": [-1.0, -1.0]}), Log({"loss": LOSS, "latent_mean": [0.1, 0.0]})),
    "VAE.ROUNDTRIP": (Log({"loss": LOSS, "vae_psnr": [12.0]}), Log({"loss": LOSS, "vae_psnr": [31.0]})),
    "COND.MASK_IGNORED": (
        Log({"loss": LOSS, "loss_mask_shuffled": (STEPS[100::50], 1.001 * LOSS[100::50])}),
        Log({"loss": LOSS, "loss_mask_shuffled": (STEPS[100::50], 1.2 * LOSS[100::50])}),
    ),
    "COND.SAMPLER_MISMATCH": (Log({"draw/class": np.ones(40)}, DRAWS), Log({"draw/class": EVEN}, DRAWS)),
    "COND.DROP_SEMANTICS": (
        Log(facts={"Conditional drop probability": 0.9, "Individual probabilities": "[0.1, 0.45, 0.45]"}),
        Log(facts={"Conditional drop probability": 0.1, "Individual probabilities": "[0.1, 0.45, 0.45]"}),
    ),
    "COND.TRAIN_SAMPLE_MISMATCH": (
        Log({"condition/classes_train": [5, 5, 1, 1], "condition/classes_sampling": [2, 1, 2, 1]}),
        Log({"condition/classes_train": [5, 5, 1, 1], "condition/classes_sampling": [5, 4, 1, 1]}),
    ),
    "GRAD.VANISHING": (
        Log({"loss": LOSS, "grad_norm": np.full(N, 1e-9)}),
        Log({"loss": LOSS, "grad_norm": np.full(N, 0.5)}),
    ),
    "GRAD.EXPLODING": (
        Log({"loss": LOSS, "grad_norm": at_end(np.ones(N), 40, 90.0)}),
        Log({"loss": LOSS, "grad_norm": np.ones(N)}),
    ),
    "GRAD.RISING": (
        Log({"loss": at_end(LOSS, 60, 2 * LOSS[-60:]), "grad_norm": 2.0 ** (np.arange(N) / 60)}),
        Log({"loss": LOSS, "grad_norm": 2.0 ** (np.arange(N) / 60)}),
    ),
    "GRAD.ABSURD_SCALE": (
        Log({"loss": LOSS, "grad_norm": np.full(N, 1e6)}),
        Log({"loss": LOSS, "grad_norm": np.ones(N)}),
    ),
    "GRAD.CLIP_RATE": (
        Log({"loss": LOSS, "grad_norm": np.full(N, 7.0)}, {"max_grad_norm": 1.0}),
        Log({"loss": LOSS, "grad_norm": np.tile([0.5, 1.5], N // 2)}, {"max_grad_norm": 1.0}),
    ),
    "GRAD.NOISE_SCALE": (
        Log({"loss": LOSS, "grad_noise_scale": np.full(N, 5000.0)}, {"batch_size": 32}),
        Log({"loss": LOSS, "grad_noise_scale": np.full(N, 50.0)}, {"batch_size": 32}),
    ),
    "OPT.UPDATE_RATIO": (
        Log({"loss": LOSS, "update_ratio": np.full(N, 1e-7)}),
        Log({"loss": LOSS, "update_ratio": np.full(N, 1e-3)}),
    ),
    "PARAM.UNCHANGED": (
        Log({"loss": LOSS, "param_change_blocks": np.zeros(N)}),
        Log({"loss": LOSS, "param_change_blocks": np.ones(N)}),
    ),
    "PARAM.DEAD_UNITS": (
        Log({"loss": LOSS, "dead_units": np.full(9, 0.8)}),
        Log({"loss": LOSS, "dead_units": np.full(9, 0.01)}),
    ),
    "PARAM.ATTN_ENTROPY": (
        Log({"loss": LOSS, "attn_entropy": np.full(9, 0.02)}),
        Log({"loss": LOSS, "attn_entropy": np.full(9, 0.6)}),
    ),
    "OPT.LR_TOO_LOW": (
        Log(
            {"loss": 1.2 - 0.4 * np.arange(N) / N + 0.01 * RNG.standard_normal(N)},
            {"DiT Parameters": "33M"},
            form="dit",
        ),
        Log({"loss": LOSS}, {"DiT Parameters": "33M"}, form="dit"),
    ),
    "OPT.LR_TOO_HIGH": (
        Log({"loss": at_end(FLAT, 100, 2 * FLAT[-100:]), "lr": np.minimum(STEPS / STEPS[195], 1)}),
        Log({"loss": LOSS, "lr": np.minimum(STEPS / STEPS[195], 1)}),
    ),
    "OPT.SCHEDULE_MISMATCH": (
        Log({"loss": LOSS, "lr": np.full(N, 1e-4)}, config={"lr": 1e-4, "max_steps": 30000, "lr_scheduler": "cosine"}),
        Log({"loss": LOSS, "lr": cosine(30000)}, config={"lr": 1e-4, "max_steps": 30000, "lr_scheduler": "cosine"}),
    ),
    "OPT.SCHEDULE_RESTART_JUMP": (
        Log({"loss": LOSS, "lr": np.concatenate([cosine(30000)[:220], cosine(30000)[:80]])}),
        Log({"loss": LOSS, "lr": cosine(30000)}),
    ),
    "OPT.SCHEDULE_WARMUP_SKIPPED": (
        Log({"loss": LOSS, "lr": np.full(N, 1e-4)}, {"warmup_steps": 2000}),
        Log({"loss": LOSS, "lr": 1e-4 * np.minimum(STEPS / 2000, 1)}, {"warmup_steps": 2000}),
    ),
    "OPT.SCHEDULE_STEPS_OVER_TOTAL": (Log(facts={"max_steps": 20000}), Log(facts={"max_steps": 30000})),
    "EMA.NOT_STARTED": (
        Log({"loss": (np.arange(1, 31.0), LOSS[:30])}, {"update_after_step": 100}, (("sampling", "sampling"),)),
        Log({"loss": LOSS}, {"update_after_step": 100}, (("sampling", "sampling"),)),
    ),
    "EMA.HORIZON": (Log(facts={"ema_decay": 0.9999}), Log(facts={"ema_decay": 0.999})),
    "EMA.LAG": (
        Log({"loss": LOSS, "val_loss": held_out(1, 0.9, 0.8, 0.7), "val_ema_loss": held_out(1.2, 1.1, 1.0, 0.9)}),
        Log({"loss": LOSS, "val_loss": held_out(1, 0.9, 0.8, 0.7), "val_ema_loss": held_out(1.2, 0.8, 0.7, 0.6)}),
    ),
    "GEN.OVERFIT": (
        Log({"loss": LOSS, "val_loss": held_out(0.9, 0.5, 0.55, 0.6, 0.7)}),
        Log({"loss": LOSS, "val_loss": held_out(0.9, 0.5, 0.48, 0.47, 0.475)}),
    ),
    "GEN.MEMORISATION_NO_EVAL": (
        Log({"loss": np.exp(-5 * np.arange(N) / N), "epoch": 4 * EPOCHS}),
        Log({"loss": np.exp(-5 * np.arange(N) / N), "epoch": 4 * EPOCHS, "val_loss": held_out(1, 0.9, 0.9)}),
    ),
    "GEN.EPOCH_STAIRCASE": (Log({"loss": stairs(0.4), "epoch": EPOCHS}), Log({"loss": LOSS, "epoch": EPOCHS})),
    "GEN.TOO_EASY": (Log({"loss": np.where(np.arange(N) < 4, 5.0, 1e-4)}), Log()),
    "EVAL.SCORE_RISING": (
        Log({"loss": LOSS, "fid": held_out(90, 40, 22, 30, 45)}),
        Log({"loss": LOSS, "fid": held_out(90, 40, 22, 21, 20)}),
    ),
    "EVAL.MISSING": (Log(), Log({"loss": LOSS, "val_loss": held_out(1, 0.9, 0.9)})),
    "SCALE.ACCUM_NOT_DIVIDED": (
        Log({"loss": 8 * LOSS, "eval_loss": (STEPS[50::50], LOSS[50::50])}, {"gradient_accumulation_steps": 8}),
        Log({"loss": LOSS, "eval_loss": (STEPS[50::50], LOSS[50::50])}, {"gradient_accumulation_steps": 8}),
    ),
    "GAN.DISCRIMINATOR_WINS": (
        Log({"G": np.linspace(0.7, 9, N), "D": 1.3 * np.exp(-0.05 * np.arange(N))}),
        Log({"G": 0.8 + 0.1 * RNG.standard_normal(N), "D": 1.3 + 0.1 * RNG.standard_normal(N)}),
    ),
    "GAN.LOSS_EXPLODED": (
        Log({"G": np.exp(np.arange(N) / 30), "D": np.exp(np.arange(N) / 30)}),
        Log({"G": 0.8 + 0.1 * RNG.standard_normal(N), "D": 1.3 + 0.1 * RNG.standard_normal(N)}),
    ),
    "RUN.NO_STEPS": (Log({}, {"epochs": 3}, (("epoch", "0"),), form="dit"), Log(form="dit")),
    "RUN.FAILED": (Log(events=(("error", "RuntimeError: boom"),)), Log(events=(("done", "Done!"),))),
    "RUN.TOO_SHORT": (Log({"loss": LOSS[:2]}), Log()),
    "RUN.TRUNCATED": (Log(facts={"max_steps": 99999}), Log(facts={"max_steps": 30000})),
    "RUN.MULTI_SEGMENT": (Log({"loss": (np.tile(STEPS, 2), np.tile(LOSS, 2))}), Log()),
    "RUN.RESTARTS": (Log({"loss": (np.r_[STEPS[:200], STEPS[150:]], np.r_[LOSS[:200], LOSS[150:]])}), Log()),
    "RUN.STALLED": (
        Log({"loss": LOSS, "wall_time": 60 * np.arange(N) + 9000 * (np.arange(N) > 99)}),
        Log({"loss": LOSS, "wall_time": 60 * np.arange(N)}),
    ),
    "PERF.THROUGHPUT_DROP": (
        Log({"loss": LOSS, "steps_per_sec": at_end(np.full(N, 5.0), 90, 3.0)}),
        Log({"loss": LOSS, "steps_per_sec": np.full(N, 5.0)}),
    ),
    "PERF.STEP_OUTLIER": (
        Log({"loss": LOSS, "wall_time": np.cumsum(np.where(np.arange(N) % 20 == 19, 300, 60))}),
        Log({"loss": LOSS, "wall_time": 60 * np.arange(N)}),
    ),
    "PERF.EVAL_SHARE": (
        Log({"loss": LOSS, "eval_runtime": held_out(400.0, 400.0)}, {"train_runtime": 1000}),
        Log({"loss": LOSS, "eval_runtime": held_out(4.0, 4.0)}, {"train_runtime": 1000}),
    ),
    "PERF.DATA_WAIT": (
        Log({"loss": LOSS, "data_wait": np.full(9, 0.5)}),
        Log({"loss": LOSS, "data_wait": np.full(9, 0.02)}),
    ),
    "PERF.MEM_GROWTH": (
        Log({"loss": LOSS, "gpu_mem": np.linspace(4, 9, N)}),
        Log({"loss": LOSS, "gpu_mem": np.full(N, 4.0)}),
    ),
    "LOG.MISSING_LR": (Log(), Log({"loss": LOSS, "lr": np.full(N, 1e-4)})),
    "LOG.MISSING_GRAD": (Log(), Log({"loss": LOSS, "grad_norm": np.ones(N)})),
    "LOG.MISSING_T_BINS": (Log(facts=DIFFUSION), Log({"loss": LOSS, "loss_q0": LOSS, "loss_q1": LOSS}, DIFFUSION)),
    "LOG.WARNING.TORCH_LOAD": (
        Log(
            events=(
                ("warning", "/x/site-packages/diffusers/a.py:1: FutureWarning: You are using `torch.load` with ..."),
            ),
            form="guided-text",
        ),
        Log(form="guided-text"),
    ),
    "LOG.WARNING.OTHER": (
        Log(events=(("warning", "/x/train.py:1: UserWarning: lr_scheduler.step() before"),), form="guided-text"),
        Log(form="guided-text"),
    ),
    "DATA.IMBALANCE_IMAGE": (
        Log(facts={"Train set summary": "[50000, 400]"}),
        Log(facts={"Train set summary": "[500, 400]"}),
    ),
    "DATA.IMBALANCE_PIXEL": (
        Log({"pixels/class_0": [900] * 6, "pixels/class_1": [9] * 6}),
        Log({"pixels/class_0": [900] * 6, "pixels/class_1": [300] * 6}),
    ),
    "DATA.IMBALANCE_EFFECTIVE": (Log({"draw/class": np.r_[np.zeros(200), 1]}), Log({"draw/class": EVEN})),
    "DATA.BLANK_IMAGE": (Log({"image/std": [50, 1.7, 60]}), Log({"image/std": [50, 48, 60]})),
    "DATA.MASK_VALUES": (
        Log({"pixels/class_9": [5]}, {"num_classes": 5}),
        Log({"pixels/class_4": [5]}, {"num_classes": 5}),
    ),
    "DATA.RANGE": (
        Log({"input/low": [0.0], "input/high": [255.0]}),
        Log({"input/low": [0.0], "input/high": [1.0]}),
    ),
    "DATA.DUPLICATE": (
        Log({"draw/class": EVEN, "draw/size": np.full(160, 5000), "draw/index": np.arange(160) // 2}),
        Log({"draw/class": EVEN, "draw/size": np.full(160, 5000), "draw/index": np.arange(160)}),
    ),
}


def examined_case(folder: Path, case: Log) -> Examination:
    """The examination of a fixture; its log is written into a folder."""
    log = built(folder / "log", case.series, None, case.facts, case.events, case.form)
    other = built(folder / "other", {"loss": case.baseline}) if case.baseline is not None else None
    return judged(log, case.config, baseline=other)
