"""Second spellings of config keys, for users of huggingface's training scripts; each is rewritten to ours when read.

`num_train_epochs: N` is `train.steps: N epochs`. `report_to: wandb | tensorboard | all | none` is `logging.wandb` and
`logging.tensorboard`. A config that sets both spellings of a key is refused, since one of them would be overruled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rqvae.errors import BadInput

EPOCHS, REPORT = "num_train_epochs", "report_to"
MIRRORS = {
    "wandb": {"wandb": "auto", "tensorboard": False},
    "tensorboard": {"wandb": "disabled", "tensorboard": True},
    "all": {"wandb": "auto", "tensorboard": True},
    "none": {"wandb": "disabled", "tensorboard": False},
}
Texts = dict[str, dict[str, Any]]


def spelled_out(texts: Texts, overrides: Sequence[str]) -> tuple[Texts, list[str]]:
    """Config files and command-line overrides with our spellings alone.

    Args:
        texts: content of each file.
        overrides: `--train.steps 20` and the like.

    Raises:
        BadInput: a value that the key does not take, or both spellings of one key.
    """
    given = {name: text for name, text in texts.items() if EPOCHS in text or REPORT in text}
    words = _joined(overrides)
    if not given and not any(word.partition("=")[0] in (f"--{EPOCHS}", f"--{REPORT}") for word in words):
        return texts, list(overrides)
    rewritten = {name: _rewrite(name, text) for name, text in texts.items()}
    rest, extra = [], {}
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        if key in (EPOCHS, REPORT):
            extra[key] = int(value) if value.isdigit() else value
        else:
            rest.append(word)
    for section, values in _rewrite("command line", extra).items():
        rest += [f"--{section}.{key}={value}" for key, value in values.items()]
    _check_once(texts, words)
    return rewritten, rest


def _joined(overrides: Sequence[str]) -> list[str]:
    """`--key=value` for each override; hyphens in the names of second spellings are underlines."""
    words: list[str] = []
    for token in overrides:
        if token.startswith("--") or not words or "=" in words[-1]:
            name, equals, value = token.partition("=")
            plain = name.replace("-", "_").replace("__", "--", 1)
            words.append(f"{plain if plain in (f'--{EPOCHS}', f'--{REPORT}') else name}{equals}{value}")
        else:
            words[-1] += f"={token}"
    return words


def _rewrite(where: str, text: dict[str, Any]) -> dict[str, Any]:
    """A file's content with our spellings."""
    text = {key: value for key, value in text.items() if key not in (EPOCHS, REPORT)} | {
        key: text[key] for key in (EPOCHS, REPORT) if text.get(key) is not None
    }
    if EPOCHS in text:
        epochs = text.pop(EPOCHS)
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise BadInput(f"{where}: {EPOCHS}: expected a whole number of at least 1, got {epochs!r}")
        text["train"] = {**text.get("train", {}), "steps": f"{epochs} epochs"}
    if REPORT in text:
        told = text.pop(REPORT)
        if told not in MIRRORS:
            raise BadInput(f"{where}: {REPORT}: expected one of {', '.join(MIRRORS)}, got {told!r}")
        text["logging"] = {**text.get("logging", {}), **MIRRORS[told]}
    return text


def _check_once(texts: Texts, words: Sequence[str]) -> None:
    """BadInput where both spellings of a key are set, in files or on the command line."""
    named = {word.removeprefix("--").partition("=")[0] for word in words}
    for second, section, keys in ((EPOCHS, "train", ("steps",)), (REPORT, "logging", ("wandb", "tensorboard"))):
        has_second = [f for f, text in texts.items() if text.get(second) is not None]
        has_second += ["command line"] if second in named else []
        for key in keys:
            first = [f for f, text in texts.items() if key in (text.get(section) or {})]
            first += ["command line"] if f"{section}.{key}" in named else []
            if has_second and first:
                raise BadInput(
                    f"{has_second[-1]}: {second}: expected {section}.{key} or {second}, not both; "
                    f"{section}.{key} is set in {first[-1]}"
                )
