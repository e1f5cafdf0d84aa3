"""Whether the parts that a config names have the methods that the trainer will call, before anything starts."""

from __future__ import annotations

from rqvae.callbacks.interfaces import Intervention, Observer
from rqvae.contracts import check_methods, check_type
from rqvae.img_datasets.interfaces import DataSpec, LabeledImageDataset, Split, Transform
from rqvae.models.interfaces import Stage1Model, Stage2Model, base_connector
from rqvae.models.losses.interfaces import ImageLoss
from rqvae.run import AnyRun, DataSettings, Stage1Run

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def check_parts(run: AnyRun) -> None:
    """Look at every part that may be foreign but the generator, which `check_generator` looks at once it is made.

    Raises:
        BadInput: a method with other arguments than its interface has, or a `spec` that is none.
    """
    check_data(run.data)
    check_methods(run.stage1, Stage1Model, "stage1")
    for i, observer in enumerate(run.observers):
        check_methods(observer, Observer, f"observers[{i}]")
    for i, intervention in enumerate(run.interventions):
        check_methods(intervention, Intervention, f"interventions[{i}]")
    if isinstance(run, Stage1Run):
        for i, loss in enumerate(run.losses):
            check_methods(loss, ImageLoss, f"losses[{i}]")
    elif run.connector is not None:
        check_methods(run.connector, base_connector, "connector")


def check_data(data: DataSettings) -> None:
    """The dataset and the transforms of all splits; BadInput as `check_parts`."""
    for split in SPLITS:
        dataset, transform = data.make(split)
        check_methods(dataset, LabeledImageDataset, "data.dataset")
        check_type(dataset.spec, DataSpec, f"data.dataset: {type(dataset).__name__}.spec")
        check_methods(transform, Transform, f"data.{split}_transform")


def check_generator(stage2: Stage2Model) -> None:
    """The generator; BadInput as `check_parts`."""
    check_methods(stage2, Stage2Model, "stage2")
