"""Image datasets of the Hugging Face `datasets` library: by their name on the hub, or a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rqvae.errors import BadInput
from rqvae.img_datasets.hub import ask, library
from rqvae.img_datasets.image_folder import read_image
from rqvae.img_datasets.interfaces import ClassCondition, DataSpec, LabeledImageData, LabeledImageDataset, Split
from rqvae.img_datasets.stored_rows import ParquetRows, TableRows
from rqvae.randomness import generator

SPLITS = {"train": "train", "val": "validation", "test": "test"}


class Rows(Protocol):
    """A table that is read by row number."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """The row's image and label, by column."""
        ...

    def order(self, shuffled: Callable[[int], Tensor]) -> Tensor:
        """(N,) int64, an epoch's order; `shuffled(n)` gives random permutations of range(n)."""
        ...

    def fingerprint(self) -> str:
        """A text that changes with the content, and not with where it lies."""
        ...


class HuggingFaceImages(LabeledImageDataset):
    """A split of a dataset of images, with labels or without.

    `dataset_name` is a name on the hub (`uoft-cs/cifar10`), or a folder: one written by `Dataset.save_to_disk`, one
    with Parquet files, or one with a folder per split and class (`imagefolder`). Needs `pip install 'mae-dit[hf]'`.

    The library keeps downloads under HF_HOME. Private and gated datasets need HF_TOKEN or `hf auth login`; the token is
    the library's business alone: no key takes it and nothing of ours writes it. HF_HUB_OFFLINE=1 uses what is there.

    Not streaming, the dataset is on the disk and read in any order. Streaming reads Parquet files (a folder's, or the
    hub's) row group by row group where they are, and downloads nothing in advance. Row i is found through the files'
    footers, so that a position in the stream is a place in a file: a run that goes on reads footers and the row groups
    from its position on, nothing before. A shuffled epoch has the row groups in random order, and the rows of every
    `shuffle_groups` of them shuffled together; every epoch has every row once. Two things follow. A dataset sorted by
    class gives batches of few classes. And each loader process of each rank reads all row groups of which it serves a
    row: `data.workers: 1` reads the least.

    Args:
        split: train, val or test.
        dataset_name: name on the hub, or a folder.
        size: side of the square that the transform crops, in pixels.
        num_classes: classes of the label column; 0 for images without classes.
        config_name: which of the dataset's configurations, where it has several.
        revision: branch, tag or commit on the hub; a commit makes a run repeatable. `refs/convert/parquet` is where the
            hub keeps Parquet copies of datasets in other formats.
        splits: the dataset's own name of each split; train, validation and test by default. `train[:90%]` is
            understood for what is not streamed and not written by `save_to_disk`.
        image_column: column of images.
        label_column: column of integers in [0, num_classes).
        max_samples: the first so many of the split; null is all.
        streaming: read Parquet files where they are.
        shuffle_groups: row groups that are shuffled together, and kept in memory, when streaming.

    Raises:
        BadInput: a size, `max_samples` or `shuffle_groups` below 1, a negative number of classes, or `splits` without
            this split.
    """

    def __init__(
        self,
        split: Split,
        *,
        dataset_name: str,
        size: int,
        num_classes: int = 0,
        config_name: str | None = None,
        revision: str | None = None,
        splits: dict[str, str] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        max_samples: int | None = None,
        streaming: bool = False,
        shuffle_groups: int = 8,
    ) -> None:
        names = SPLITS if splits is None else splits
        if split not in names:
            raise BadInput(f"splits: expected a name for {split}, got {sorted(names)}")
        if min(size, shuffle_groups, 1 if max_samples is None else max_samples) < 1 or num_classes < 0:
            got = f"{size}, {max_samples}, {shuffle_groups}, {num_classes}"
            raise BadInput(f"size, max_samples, shuffle_groups, num_classes: expected >= 1 and >= 0, got {got}")
        self.split, self.size, self.num_classes, self.name = split, size, num_classes, names[split]
        self.dataset_name, self.config_name, self.revision = dataset_name, config_name, revision
        self.image_column, self.label_column = image_column, label_column
        self.max_samples, self.streaming, self.shuffle_groups = max_samples, streaming, shuffle_groups
        self._rows: Rows | None = None

    @property
    def spec(self) -> DataSpec:
        """(3, size, size) after the transform; the names of the classes are in the data and so not known here."""
        return DataSpec((3, self.size, self.size), num_classes=self.num_classes)

    def open(self) -> None:
        """Find the split: downloads it where it is on the hub and not streamed.

        Raises:
            BadInput: no package `datasets`; no such dataset, split or column; no access; no network; streaming of what
                is not Parquet; labels outside [0, num_classes).
        """
        library()
        columns = [self.image_column, *([self.label_column] if self.num_classes else [])]
        self._rows = self._parquet(columns) if self.streaming else self._table(columns)
        if len(self._rows) == 0:
            raise BadInput(f"{self._where}: expected images, got an empty split")

    @property
    def _where(self) -> str:
        return f"data.dataset: {self.dataset_name} [{self.name}]"

    def _table(self, columns: list[str]) -> TableRows:
        """The split on the disk, mapped into memory."""
        folder = Path(self.dataset_name)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            table = ask(self.dataset_name, lambda: library().load_from_disk(self.dataset_name))
            if (folder / "dataset_dict.json").is_file():
                if self.name not in table:
                    raise BadInput(f"{self._where}: expected a split out of {sorted(table)}")
                table = table[self.name]
        else:
            found = self._found()
            table = ask(
                self.dataset_name, lambda: library().load_dataset(found, self.config_name, split=self.name, **self._at)
            )
        rows = TableRows(table, columns, self.max_samples, self._where)
        if self.num_classes:
            rows.check_labels(self.label_column, self.num_classes)
        return rows

    def _parquet(self, columns: list[str]) -> ParquetRows:
        """The split's Parquet files, by name."""
        found = self._found()
        builder = ask(self.dataset_name, lambda: library().load_dataset_builder(found, self.config_name, **self._at))
        files = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
        if files and self.name not in files:
            raise BadInput(f"{self._where}: expected a split out of {sorted(files)}")
        if not files or not all(str(file).endswith(".parquet") for file in files[self.name]):
            raise BadInput(
                f"{self._where}: streaming: expected Parquet files, got {builder.dataset_name} in another format; "
                "use streaming: false, or revision: refs/convert/parquet on the hub"
            )
        paths = [str(file) for file in files[self.name]]
        return ask(
            self.dataset_name,
            lambda: ParquetRows(paths, columns, self.max_samples, self.shuffle_groups, self._where),
        )

    @property
    def _at(self) -> dict[str, Any]:
        return {} if self.revision is None else {"revision": self.revision}

    def _found(self) -> str:
        """`dataset_name`; BadInput for a folder that is not there, which would be looked for on the hub."""
        name = self.dataset_name
        if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise BadInput(
                f"data.dataset: {name}: expected a folder, or a name on the hub (USER/DATASET); no such folder"
            )
        return name

    def _open_rows(self) -> Rows:
        if self._rows is None:
            raise RuntimeError("HuggingFaceImages: open() must be called before the first sample")
        return self._rows

    def fingerprint(self) -> str:
        """Of the content and of how it is read, as a streamed epoch has another order; not of where it lies."""
        return f"HuggingFaceImages:{self.split}:{self.size}:{self._open_rows().fingerprint()}"

    def order(self, seed: int, epoch: int) -> Tensor:
        """(N,) int64: any permutation; when streaming, row groups in random order, and rows shuffled among a few."""
        rng = generator(seed, "order", epoch)
        return self._open_rows().order(lambda n: torch.randperm(n, generator=rng))

    def __len__(self) -> int:
        return len(self._open_rows())

    def __getitem__(self, index: int) -> LabeledImageData:
        """`img` uint8 (3, H0, W0), `condition` with classes, `img_path` the stored name or the row's number.

        Raises:
            BadInput: an image that cannot be read, or a label outside [0, num_classes).
        """
        row = self._open_rows().row(index)
        stored = row[self.image_column]
        content, path = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
        name = path or f"{self.dataset_name}[{self.name}][{index}]"
        if not isinstance(content, bytes) and not (content is None and path):
            raise BadInput(f"{name}: {self.image_column}: expected an encoded image, got {type(content).__name__}")
        condition = self._condition(row, name) if self.num_classes else None
        return LabeledImageData(img=read_image(name, content), condition=condition, img_path=name)

    def _condition(self, row: dict[str, Any], name: str) -> ClassCondition:
        label = row[self.label_column]
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise BadInput(
                f"{name}: {self.label_column}: expected an integer in [0, {self.num_classes}), got {label!r}"
            )
        return ClassCondition(torch.tensor(label), self.num_classes)
