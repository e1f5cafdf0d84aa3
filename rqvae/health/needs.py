"""What checks need, whether a subject has it, and what to log where it does not."""

from __future__ import annotations

from collections.abc import Callable

from rqvae.health.subject import Subject

ENOUGH = 20
"""Points below which no trend of a loss is judged."""


def _points(role: str, least: int) -> Callable[[Subject], bool]:
    return lambda subject: any(len(series.finite) >= least for series in subject.all(role))


NEEDS: dict[str, tuple[Callable[[Subject], bool], str]] = {
    "train_loss": (lambda s: s.loss is not None and len(s.loss) > 0, "the training loss"),
    "trend": (
        lambda s: s.loss is not None and len(s.loss) >= ENOUGH,
        f"the training loss at {ENOUGH} steps or more",
    ),
    "minimised": (lambda s: not s.is_gan, "a loss that is minimised (those of a GAN need not fall)"),
    "diffusion": (lambda s: s.is_diffusion, "that the run is a diffusion (its objective, or losses by timestep)"),
    "objective": (lambda s: s.trivial is not None, "what the network predicts (eps, v, velocity) and the loss type"),
    "gan": (lambda s: s.is_gan, "the losses of generator and discriminator"),
    "eval_loss": (_points("eval_loss", 1), "a held-out loss"),
    "eval_trend": (_points("eval_loss", 3), "a held-out loss at 3 steps or more"),
    "grad_norm": (_points("grad_norm", 1), "the gradient norm before clipping"),
    "grad_trend": (_points("grad_norm", ENOUGH), f"the gradient norm before clipping at {ENOUGH} steps or more"),
    "lr": (_points("lr", 1), "the learning rate"),
    "lr_trend": (_points("lr", 10), "the learning rate at 10 steps or more"),
    "t_bins": (lambda s: len(s.all("t_bin")) >= 2, "the loss by timestep (quartiles)"),
    "epochs": (_points("epoch", 4), "the epoch of each point"),
    "wall_time": (_points("wall_time", 10), "a time stamp at each point"),
    "throughput": (_points("throughput", 12), "steps or images a second"),
    "loss_scale": (_points("loss_scale", 3), "the loss scale"),
    "update_ratio": (_points("update_ratio", 3), "the ratio of update to weight norm"),
    "param_change": (_points("param_change", 2), "how much each group of weights changed"),
    "dead_units": (_points("dead_units", 3), "the share of dead units"),
    "attention_entropy": (_points("attention_entropy", 3), "the entropy of attention, relative to log n"),
    "grad_noise_scale": (_points("grad_noise_scale", ENOUGH), f"the gradient noise scale at {ENOUGH} steps or more"),
    "ema_eval": (_points("ema_eval", 3), "the held-out loss of the average beside that of the weights"),
    "mask_probe": (_points("mask_shuffled", 3), "the loss under shuffled conditions, now and then"),
    "latent_std": (_points("latent_std", 1), "mean and standard deviation of the latents that are trained on"),
    "latent_mean": (_points("latent_mean", 1), "mean and standard deviation of the latents that are trained on"),
    "latent_psnr": (_points("latent_psnr", 1), "the PSNR of encode and decode"),
    "score": (lambda s: bool(s.all("score_low")), "a score such as FID at several steps"),
    "memory": (_points("memory", ENOUGH), f"memory at {ENOUGH} steps or more"),
    "data_wait": (_points("data_wait", 3), "the time a step waits for data"),
    "draws": (lambda s: "draw/class" in s.segment.series, "the class that each draw selected"),
    "timestep_draws": (lambda s: "draw/timestep" in s.segment.series, "the timesteps that were drawn"),
    "images": (lambda s: "image/std" in s.segment.series, "mean and standard deviation of the images that are loaded"),
    "pixels": (lambda s: any(n.startswith("pixels/") for n in s.segment.series), "how many pixels each class has"),
    "input_range": (lambda s: "input/low" in s.segment.series, "the range of the images that the VAE is given"),
    "conditions": (
        lambda s: {"condition/classes_train", "condition/classes_sampling"} <= set(s.segment.series),
        "the conditions of training and of sampling",
    ),
    "config": (lambda s: bool(s.config), "nothing more: give the config with --config"),
    "source": (lambda s: s.source is not None, "nothing more: give the program's source with --source"),
    "baseline": (lambda s: s.baseline is not None, "nothing more: give another run with --baseline"),
    "step_total": (lambda s: s.total_steps is not None, "how many steps the run was to take"),
}


def unmet(subject: Subject, needs: tuple[str, ...]) -> str | None:
    """What is missing for a check, in words; None if nothing is."""
    for need in needs:
        has, words = NEEDS[need]
        if not has(subject):
            return f"log {words}" if not words.startswith(("nothing more", "that ", "a loss that")) else words
    return None
