"""The model card of an exported folder, README.md: front matter for the hub, and what a stranger must know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from rqvae.api.exported import Description
from rqvae.models.interfaces import Stage1Model
from rqvae.models.two_stage import TwoStage

DATA_LIMIT = "Trained on the data named above and on nothing else: expect no sense outside of it."
COPY_LIMIT = "Samples may repeat training images; nobody has looked for that unless a score above says so."


def write_card(
    folder: Path,
    description: Description,
    stage1: Stage1Model,
    two_stage: TwoStage | None,
    licence: str = "unknown",
    *,
    for_diffusers: bool = False,
) -> None:
    """Write README.md into an exported folder.

    Args:
        folder: of the model.
        description: of the model.
        stage1: the autoencoder.
        two_stage: the whole model; None for an autoencoder alone.
        licence: an identifier of the hub, such as apache-2.0.
        for_diffusers: whether diffusers loads the folder.
    """
    modules: dict[str, nn.Module] = {"stage1": stage1}
    if two_stage is not None:
        modules |= {"connector": two_stage.connector, "stage2": two_stage.stage2}
    sections = [
        _front_matter(two_stage is not None, licence, for_diffusers),
        _what_it_is(description, modules),
        "## Load it\n\n" + _how_to_load(two_stage is not None, for_diffusers),
        "## Where it is from\n\n" + _source(description.source),
        "## Scores\n\n" + _scores(description.source.get("scores") or {}),
        "## Limits\n\n" + "\n".join([f"- {DATA_LIMIT}", *([f"- {COPY_LIMIT}"] if two_stage is not None else [])]),
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def _front_matter(generates: bool, licence: str, for_diffusers: bool) -> str:
    values = {
        "license": licence,
        "library_name": "diffusers" if for_diffusers else "mae-dit",
        "tags": ["mae-dit", *(["image-generation"] if generates else ["autoencoder", "image-reconstruction"])],
    }
    if generates:
        values["pipeline_tag"] = "unconditional-image-generation"
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _what_it_is(description: Description, modules: dict[str, nn.Module]) -> str:
    spec = description.data_spec
    _, height, width = spec.image_shape
    kind = "A generator of images and its autoencoder" if "stage2" in modules else "An autoencoder of images"
    counts = {"classes": spec.num_classes, "actions": spec.num_actions, "mask classes": spec.num_mask_classes}
    conditions = [f"{count} {name}" for name, count in counts.items() if count]
    under = f", conditioned on {' and '.join(conditions)}" if conditions and "stage2" in modules else ""
    rows = [
        f"| {name} | `{type(module).__module__}.{type(module).__qualname__}` | "
        f"{sum(p.numel() for p in module.parameters()):,} |"
        for name, module in modules.items()
    ]
    table = "\n".join(["| part | class | parameters |", "|---|---|---|", *rows])
    title = description.source.get("run") or type(modules["stage1"]).__name__
    return f"# {title}\n\n{kind} of {height} x {width} pixels{under}.\n\n{table}"


def _how_to_load(generates: bool, for_diffusers: bool) -> str:
    if for_diffusers:
        lines = [
            "from diffusers import AutoencoderKL",
            'vae = AutoencoderKL.from_pretrained("THIS FOLDER OR HUB ID")',
            "latents = vae.encode(images).latent_dist.mode()  # images (n, 3, H, W) in [-1, 1]",
        ]
    else:
        lines = ["import rqvae", 'pipeline = rqvae.load("THIS FOLDER OR HUB ID")']
        lines.append("images = pipeline.sample(16)" if generates else "images = pipeline.reconstruct(images)")
        lines[-1] += "  # (n, 3, H, W) in [0, 1]"
    return "\n".join(["```python", *lines, "```"])


def _source(source: dict[str, Any]) -> str:
    rows = []
    for key, value in source.items():
        if key not in ("scores", "dataset", "command") and value is not None:
            rows.append(f"- {key.replace('_', ' ')}: {value if isinstance(value, str | int) else json.dumps(value)}")
    if dataset := source.get("dataset"):
        rows.append(f"- data: `{dataset['class_path']}` {json.dumps(dataset['init_args'])}")
    if command := source.get("command"):
        rows.append(f"- trained by: `{command}`")
    return "\n".join(rows) or "Not recorded."


def _scores(scores: dict[str, float]) -> str:
    if not scores:
        return "None was measured while it was trained."
    return "\n".join(["| score | value |", "|---|---|", *(f"| {key} | {value:.4f} |" for key, value in scores.items())])
