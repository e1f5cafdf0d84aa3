"""What a metric's name means, for names of any project."""

from __future__ import annotations

import re
from functools import lru_cache

_HELD_OUT = r"^(eval|val|valid|validation|test|dev|heldout|held_out)(_|$)"
_RULES: tuple[tuple[str, str], ...] = (
    ("wall_time", r"^wall_time$"),
    ("epoch", r"(^|_)epochs?$"),
    ("loss_scale", r"loss_?scale$|^scaler|grad_scale(_|$)"),
    ("t_bin", r"(^|_)loss_(q|t_?bin_?|bin_?t?_?|t_?)\d+$|(^|_)loss_by_t_\d+$"),
    ("class_loss", r"(^|_)loss_class_?\d+$"),
    ("skipped", r"skipped_steps$|nonfinite_(count|replaced)$|nan_replaced$"),
    ("grad_noise_scale", r"(grad\w*_)?noise_scale$|b_simple$"),
    ("grad_d", r"grad_?norm_(d|disc|discriminator)$"),
    ("grad_norm", r"grad(ient)?s?_?(2_?|total_?|global_?)*norm|^(total|global)_norm$|(^|_)gnorm$"),
    ("update_ratio", r"update_(to_(weight|param)_)?ratio"),
    ("param_change", r"param\w*_(change|delta|unchanged)"),
    ("param_norm", r"(param|weight)_?norm"),
    ("dead_units", r"dead_(units|relu|neurons?)|zero_fraction"),
    ("attention_entropy", r"att(entio)?n\w*_entropy"),
    ("ema_eval", _HELD_OUT + r".*ema.*loss|^ema_(eval|val)?_?loss"),
    ("mask_shuffled", r"loss\w*shuffled|shuffled\w*loss"),
    ("mask_right", r"loss\w*mask_right|mask_right\w*loss"),
    ("latent_std", r"latent\w*_std|std\w*latent"),
    ("latent_mean", r"latent\w*_mean$"),
    ("latent_psnr", r"(vae|roundtrip|round_trip)\w*psnr"),
    ("eval_step_rate", _HELD_OUT + r".*(per_second|runtime|seconds|time)$"),
    ("train_summary", r"^train_(runtime|samples_per_second|steps_per_second)$"),
    ("lr_d", r"(^|_)(lr|learning_rate)_?(d|disc|discriminator)$"),
    ("lr", r"(^|_)(lr|learning_?rate)(_|$)"),
    ("gan_d", r"(^|_)(d|disc|discriminator|critic|dis)_(train_)?loss|loss_(d|disc|discriminator|critic|dis)(_|$)|^d$"),
    ("gan_g", r"(^|_)(g|gen|generator|gan)_(train_)?loss|loss_(g|gen|generator|gan)(_|$)|^g$|^gp$|^pl$"),
    ("logits_real", r"(logits?|scores?)_real$"),
    ("logits_fake", r"(logits?|scores?)_fake$"),
    ("score_low", r"(^|_)(fid|kid|wer|cer|lpips|perplexity|ppl|mse|mae|rmse)(\d+k?)?(_full)?$"),
    ("score_high", r"(^|_)(psnr|ssim|acc(uracy)?|f1|bleu|rouge\w*|precision|recall|is|miou|auc)$"),
    ("eval_loss", _HELD_OUT + r"(.*_)?(loss|nll)(_|$)|(^|_)loss_(eval|val|valid|validation|test)$"),
    ("held_out", _HELD_OUT),
    ("throughput", r"(steps?|its?|iters?|images?|imgs?|samples?|tokens?)_?(/|per)_?(s|sec|second)(_|$)|^fps$"),
    ("step_time", r"sec(onds)?_per_(step|iter|it|tick|kimg)|(^|_)(step|iter|batch)_time(_s)?$|^timing_sec_per_kimg"),
    ("data_wait", r"data_(wait|time)|wait_data"),
    ("memory", r"(gpu|cuda|peak|cpu)?_?mem(ory)?(_|$)"),
    ("train_loss", r"(^|_)(loss|nll|elbo)(_|$)"),
)
_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _RULES)
PRIMARY = ("loss_total", "total_loss", "train_loss", "training_loss", "loss", "loss_loss", "loss_train", "loss_simple")
"""Names of the loss that is trained on, the surest first; prefixes `train_` and `loss_` are looked past."""


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """Lower case, words joined by underscores: `Train Steps/Sec` is `train_steps_per_sec`."""
    spelt = re.sub(r"([a-z])/(s|sec|second)\b", r"\1_per_\2", name.lower().strip())
    return re.sub(r"_+", "_", re.sub(r"[^a-z0-9]+", "_", spelt)).strip("_")


@lru_cache(maxsize=4096)
def role_of(name: str) -> str | None:
    """The role of a metric; None where its name says nothing that a check could use."""
    plain = plain_name(name)
    return next((role for role, pattern in _COMPILED if pattern.search(plain)), None)


def primary_rank(name: str) -> int:
    """How likely a training loss is the one that is trained on: smaller is likelier."""
    plain = plain_name(name)
    for candidate in (plain, plain.removeprefix("train_"), plain.removesuffix("_step"), plain.removesuffix("_epoch")):
        if candidate in PRIMARY:
            return PRIMARY.index(candidate)
    return len(PRIMARY)
