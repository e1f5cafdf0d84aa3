"""Scores while training: images of the evaluated weights on all ranks, sums over them, distances on rank 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rqvae.backends import Backend
from rqvae.callbacks.interfaces import RunView
from rqvae.errors import BadInput
from rqvae.files import write_json
from rqvae.img_datasets.interfaces import DataSpec
from rqvae.metrics.evaluation import SPLITS, FeatureSums, distance_between
from rqvae.metrics.extractors import Extractor, make_extractor
from rqvae.metrics.feature_files import FeatureFile, moments, write_features, write_statistics
from rqvae.metrics.frechet import FrechetDistance
from rqvae.metrics.perceptual import LPIPSScore
from rqvae.metrics.protocol import cautions, cautions_of_order, protocol
from rqvae.metrics.reconstruction import CONVENTIONS, UINT8_RULE, WINDOW, ReconstructionScores
from rqvae.models.ema import EMA
from rqvae.run import AnyRun
from rqvae.trainers.evaluation_trainer import SplitWalk
from rqvae.trainers.online_images import ImageMaker, MadeBatch
from rqvae.trainers.parts import float_type, on_main
from rqvae.trainers.references import OnlineReference, add_features, load_extractor, originals
from rqvae.trainers.settings import OnlineEvalSettings

ALLOWED: dict[int, tuple[str, ...]] = {
    1: ("psnr", "ssim", "lpips", "rfid", "sfid", "is"),
    2: ("gfid", "sfid", "is"),
}
"""Scores of each stage."""
OF_FEATURES = {"rfid", "gfid", "sfid", "is"}
OF_INCEPTION = {"sfid", "is"}
INCEPTION_SCORE = f"inception_score_shuffled_{SPLITS}"


def prepare(
    run: AnyRun, backend: Backend, maker_of: Callable[[SplitWalk], ImageMaker], ema: Sequence[EMA]
) -> OnlineScores | None:
    """What the config asks for, with its networks loaded; None where it asks for nothing. Collective.

    Args:
        run: the experiment.
        backend: this rank.
        maker_of: makes the images' source from the validation split.
        ema: the first one is evaluated.

    Raises:
        BadInput: weights or a reference that are missing or do not fit; a validation split that is too small.
    """
    settings = run.online_eval
    if not settings.every:
        return None
    bar, per_rank = run.logging.progress, settings.batch_size if needs_extractor(settings) else 0
    dtype = float_type(run.train.precision)  # scores are computed without autocast
    maker = maker_of(SplitWalk(run.data, "val", backend, dtype, per_rank=per_rank))
    precision = str(dtype).removeprefix("torch.")
    scores = OnlineScores(settings, maker, backend, ema[0].name if ema else "model", precision, bar=bar)
    if needs_extractor(settings):
        scores.extractor = load_extractor(settings.extractor, backend, "online_eval.extractor")
        own, images = originals(run.data, "val", backend, settings.batch_size), settings.images if run.stage == 1 else 0
        scores.reference = OnlineReference(own, scores.extractor, settings.reference, images, bar)
        scores.reference.check()
    # `count` opens the split, which the other ranks need not: a mistake of it is told before the first step
    on_main(backend, lambda: _check_counts(settings, maker, scores.reference))
    if "lpips" in settings.metrics:
        scores.lpips = _load_lpips(settings, backend)
    return scores


def _check_counts(settings: OnlineEvalSettings, maker: ImageMaker, reference: OnlineReference | None) -> None:
    least, names = _least_images(settings), ", ".join(settings.metrics)
    if (count := maker.count()) < least:
        raise BadInput(
            f"online_eval.images: expected at least {least} images of the validation split for {names}, it has {count}"
        )
    if reference is not None and reference.given is None and (count := reference.walk.count(reference.images)) < 2:
        raise BadInput(f"online_eval.reference: expected a file, the validation split has {count} images")


def _least_images(settings: OnlineEvalSettings) -> int:
    if not needs_extractor(settings):
        return 1
    return SPLITS if "is" in settings.metrics else 2


def _load_lpips(settings: OnlineEvalSettings, backend: Backend) -> LPIPSScore:
    try:
        lpips = LPIPSScore(net=settings.lpips_net, trunk_weights=settings.lpips_weights)
        on_main(backend, lpips.fetch)
        return lpips.load(backend.device)
    except BadInput as error:
        raise BadInput(f"online_eval.lpips_weights: {error}") from error


def needs_extractor(settings: OnlineEvalSettings) -> bool:
    """Whether a score is one of features."""
    return bool(OF_FEATURES & set(settings.metrics))


def row_names(settings: OnlineEvalSettings) -> dict[str, str]:
    """Each score and its name in metrics.jsonl; a distance is called FID only in the features of FID's network."""
    names = {"psnr": "val/psnr", "ssim": "val/ssim", "lpips": f"val/lpips_{settings.lpips_net}"}
    names |= {"rfid": "eval/rfid", "gfid": "eval/gfid", "sfid": "eval/sfid", "is": f"eval/{INCEPTION_SCORE}"}
    if needs_extractor(settings) and (own := _name(settings)) != "fid":
        names |= {"rfid": f"eval/{own}", "gfid": f"eval/{own}"}
    return {metric: names[metric] for metric in settings.metrics}


def _name(settings: OnlineEvalSettings) -> str:
    chosen = settings.extractor
    return (make_extractor(chosen) if isinstance(chosen, str) else chosen).name


def check_online_eval(run: AnyRun, spec: DataSpec) -> None:
    """That the scores which the config asks for exist for this stage, these images and this extractor.

    Raises:
        BadInput: otherwise.
    """
    settings = run.online_eval
    if not settings.every:
        if settings.reference:
            raise BadInput("online_eval.reference: expected online_eval.every to be set with it, got null")
        return
    allowed = ALLOWED[run.stage]
    if wrong := [metric for metric in settings.metrics if metric not in allowed]:
        raise BadInput(
            f"online_eval.metrics: expected scores of Stage{run.stage} ({', '.join(allowed)}), got {', '.join(wrong)}"
        )
    if {"psnr", "ssim"} & set(settings.metrics) and min(spec.image_shape[1:]) < WINDOW:
        size = tuple(spec.image_shape[1:])
        raise BadInput(f"online_eval.every: expected null for psnr and ssim of images below {WINDOW} px, got {size}")
    if needs_extractor(settings):
        if OF_INCEPTION & set(settings.metrics) and (name := _name(settings)) != "fid":
            raise BadInput(f"online_eval.metrics: sfid and is: expected the extractor inception, got that of {name}")
        least = _least_images(settings)
        if settings.images and settings.images < least:
            raise BadInput(f"online_eval.images: expected 0 or at least {least}, got {settings.images}")


@dataclass
class _Sums:
    """What one evaluation adds up; `broken` counts images that are not finite."""

    pixels: ReconstructionScores | None
    lpips: Tensor | None
    features: FeatureSums | None
    broken: Tensor


@dataclass
class OnlineScores:
    """One evaluation each time it is called; collective, every rank gets the same numbers.

    Args:
        settings: which scores.
        maker: of the images.
        backend: this rank.
        weights: name of the average that is evaluated, or `model`.
        precision: that the images are computed in.
        extractor: loaded, where a score needs it.
        reference: what features are compared with, where a score needs it.
        lpips: loaded, where it is asked for.
        bar: a progress bar on rank 0.
    """

    settings: OnlineEvalSettings
    maker: ImageMaker
    backend: Backend
    weights: str
    precision: str
    extractor: Extractor | None = None
    reference: OnlineReference | None = None
    lpips: LPIPSScore | None = None
    bar: bool = False

    def __call__(self, run: RunView) -> dict[str, float]:
        """Scores by their names in metrics.jsonl; a score of images that are not finite is NaN."""
        if self.reference is not None:
            self.reference.find(run.folder.parent)
        sums = self._empty()
        hidden = not self.bar or self.backend.rank > 0
        with torch.no_grad(), tqdm(total=self.maker.count(), desc="evaluate", disable=hidden, leave=False) as bar:
            for batch in self.maker.batches():
                self._add(sums, batch)
                bar.update(min(len(batch.ids_b) * self.backend.world_size, self.maker.count() - bar.n))
        scores = self._pixel_scores(sums)
        if sums.features is not None:
            scores = self._with_features(run, scores, sums.features, sums.broken)
        return {name: scores[metric] for metric, name in row_names(self.settings).items()}

    def _empty(self) -> _Sums:
        metrics, device, widest = set(self.settings.metrics), self.backend.device, self.backend.widest_float
        pixels = ReconstructionScores(device, widest) if {"psnr", "ssim"} & metrics else None
        lpips = torch.zeros(2, device=device, dtype=widest) if self.lpips else None
        features = None
        if self.extractor is not None:
            inception, keep = bool(OF_INCEPTION & metrics), self.settings.save_features
            features = FeatureSums(self.extractor.dim, self.maker.count(), inception=inception, keep=keep)
        return _Sums(pixels, lpips, features, torch.zeros((), device=device))

    def _add(self, sums: _Sums, batch: MadeBatch) -> None:
        images, valid = batch.images_bchw, batch.valid_b.to(batch.images_bchw.device)
        sums.broken += (valid & ~images.isfinite().flatten(1).all(1)).sum()
        if sums.pixels is not None:
            assert batch.originals_bchw is not None
            sums.pixels.update(images, batch.originals_bchw, valid)
        if sums.lpips is not None:
            assert self.lpips is not None
            assert batch.originals_bchw is not None
            distance_b = self.lpips(images, batch.originals_bchw).to(sums.lpips)
            sums.lpips += torch.stack([torch.where(valid, distance_b, 0.0).sum(), valid.sum()])
        if sums.features is not None:
            assert self.extractor is not None
            add_features(sums.features, self.extractor, images.nan_to_num(), batch.ids_b, valid)

    def _pixel_scores(self, sums: _Sums) -> dict[str, float]:
        found: dict[str, float] = {}
        if sums.pixels is not None:
            found |= ReconstructionScores.result(self.backend.all_reduce(sums.pixels.state()))
        if sums.lpips is not None:
            total, n = self.backend.all_reduce(sums.lpips).tolist()
            found["lpips"] = total / n
        return found

    def _with_features(
        self, run: RunView, pixels: dict[str, float], features: FeatureSums, broken: Tensor
    ) -> dict[str, float]:
        features.reduce(self.backend.all_reduce)
        features.gather(self.backend.all_gather)
        count = int(self.backend.all_reduce(broken))
        return on_main(self.backend, lambda: self._compare(run, pixels, features, count))

    def _compare(self, run: RunView, pixels: dict[str, float], features: FeatureSums, broken: int) -> dict[str, float]:
        """On rank 0: all scores, and RUN/eval/step_N.json with what they are."""
        file = run.folder / "eval" / f"step_{run.clock.step:08d}.json"
        side = self._write_features(file, features)
        distances = {} if broken else self._distances(side)
        scores = pixels | {metric: distance.value for metric, distance in distances.items()}
        others = {} if features.spatial is None else features.inception_scores()
        if "is" in self.settings.metrics:
            if INCEPTION_SCORE not in others:
                raise BadInput(f"online_eval.metrics: is: expected at least {SPLITS} images, got {features.n}")
            scores["is"] = others[INCEPTION_SCORE]
        if broken:
            others = dict.fromkeys(others, math.nan)
            scores |= dict.fromkeys(OF_FEATURES, math.nan)
        named = {row_names(self.settings)[metric]: scores[metric] for metric in self.settings.metrics}
        shown = {f"eval/{name}": value for name, value in others.items()} | named
        report = {
            **self._report(run, side, broken, cautions_of_order(others)),
            "distances": {metric: vars(distance) for metric, distance in distances.items()},
            "scores": shown,
        }
        write_json(file, report)
        return scores

    def _distances(self, side: FeatureFile) -> dict[str, FrechetDistance]:
        assert self.reference is not None
        assert self.reference.file is not None
        asked = [metric for metric in self.settings.metrics if metric in ("rfid", "gfid", "sfid")]
        return {m: distance_between(side, self.reference.file, spatial=m == "sfid") for m in asked}

    def _write_features(self, report: Path, features: FeatureSums) -> FeatureFile:
        """The statistics, and the features if they are to be kept, beside the report."""
        assert self.extractor is not None
        identity = {**self.extractor.identity(), **self._generation(), "n": features.n}
        pooled = moments(features.pooled)
        spatial = None if features.spatial is None else moments(features.spatial)
        path = report.with_suffix(".npz")
        write_statistics(path, pooled, features.n, identity, spatial)
        kept = features.features("pooled")
        if self.settings.save_features:
            assert kept is not None
            write_features(report.with_name(f"{report.stem}_features.npz"), kept, identity, spatial)
        of_sfid = None if features.spatial is None else features.features("spatial")
        return FeatureFile(path, "", pooled, spatial, kept, of_sfid, features.n, identity)

    def _report(self, run: RunView, side: FeatureFile, broken: int, warned: list[str]) -> dict[str, Any]:
        assert self.extractor is not None
        assert self.reference is not None
        assert self.reference.file is not None
        assert side.n is not None
        reference = self.reference.file
        labels = self.maker.labels()
        notes = (
            self.reference.notes + cautions(side.n, None if labels is None else labels.numpy(), reference.n) + warned
        )
        if self.maker.distance == "rfid" and reference.protocol.get("split", "val") != "val":
            notes.append("papers' rFID is to the validation split's originals, this reference is of another split")
        if broken:
            notes.append(f"{broken} images are not finite: there is no score")
        stated = {key: reference.protocol.get(key) for key in ("split", "data", "transform", "transform_sha256")}
        of_reference = {"path": str(reference.path), "sha256": reference.sha256, "n": reference.n, **stated}
        fields = protocol(of_reference, side.n, self.extractor.identity(), self._generation())
        conventions = {metric: text for metric, text in CONVENTIONS.items() if metric in self.settings.metrics}
        if self.lpips is not None:
            conventions["lpips"] = self.lpips.key
        moment = {"step": run.clock.step, "images": run.clock.images}
        return {**moment, "protocol": fields | {"conventions": conventions}, "warnings": notes}

    def _generation(self) -> dict[str, Any]:
        own = {"ema": self.weights, "precision": self.precision, "uint8_rule": UINT8_RULE}
        own["image_format"] = "none: scored in memory"
        return {**self.maker.facts(), **own}
