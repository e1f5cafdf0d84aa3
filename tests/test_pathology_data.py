"""Images with masks: the split, the class-balanced draws, what bad folders are told, and masks as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rqvae.errors import BadInput
from rqvae.img_datasets import mask_files
from rqvae.img_datasets.class_draws import ClassDraws, cutoffs
from rqvae.img_datasets.interfaces import LabeledImageDatasetWrapper, MaskCondition
from rqvae.img_datasets.pathology import Pathology
from rqvae.img_datasets.stratified import held_out
from rqvae.img_datasets.tissue import IHCTissue, ProceduralTissue, stain_densities, stain_mask
from rqvae.img_datasets.transforms import DihedralTransform, ValTransform
from rqvae.mask_colours import coloured

K, SIDE = 5, 16


def write_pair(folder: Path, name: str, mask: np.ndarray, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.jpg")
    Image.fromarray(mask).save(folder / f"{name}_mask.png")


@pytest.fixture
def tissue(tmp_path: Path) -> Path:
    """60 images of 10 slides with one to five classes each, as in the data whose split by class lists leaked."""
    for i in range(60):
        classes = np.random.default_rng(i).permutation(K)[: 1 + i % K]
        mask = classes[np.random.default_rng(100 + i).integers(0, len(classes), (SIDE, SIDE))]
        mask.flat[: len(classes)] = classes
        write_pair(tmp_path / "labelled", f"slide{i // 6}_{i:02d}", mask.astype(np.uint8), i)
    (tmp_path / "more").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(1000 + i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "more" / f"slide{i}_u{i:02d}.jpg")
    return tmp_path


def opened(tissue: Path, split: str = "train", **more: object) -> Pathology:
    arguments = {"unlabelled": str(tissue / "more"), **more}
    dataset = Pathology(split, data_folder=str(tissue / "labelled"), size=SIDE, num_classes=K, **arguments)  # type: ignore[arg-type]
    dataset.open()
    return dataset


def names(dataset: Pathology) -> set[str]:
    return {Path(str(dataset.without_image(i).img_path)).name for i in range(len(dataset))}


@pytest.mark.parametrize(
    ("p_cond", "edges"), [(0.5, [0.5, 0.625, 0.75, 0.875, 1.0]), (1.0, [0.0, 0.25, 0.5, 0.75, 1.0])]
)
def test_cutoffs_are_those_of_the_original_log(p_cond: float, edges: list[float]) -> None:
    assert cutoffs(p_cond, 4).tolist() == edges


def test_50k_draws_follow_p_cond() -> None:
    """The classes are as unequal as pixels are; no frequency is off by more than 1 %, and none is dropped."""
    torch.manual_seed(0)
    present = torch.rand(50_000, K) < torch.tensor([0.6, 0.02, 0.4, 0.005, 0.9])
    slots, index = ClassDraws(present, 0.5).draw(seed=3, epoch=0)
    shares = torch.bincount(slots, minlength=K) / len(slots)
    assert (shares - torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125])).abs().max() < 0.01
    for k in range(1, K):
        assert present[index[slots == k], k].all()
    # without their masks: each class as often as among the images of unconditional draws (class 0, or no mask)
    free = present[:, 0] | ~present.any(1)
    expected = present[free].double().mean(0)
    found = present[index[slots == 0]].double().mean(0)
    assert (found - expected).abs().max() < 0.015


def test_draws_are_a_function_of_seed_and_epoch() -> None:
    draws = ClassDraws(torch.ones(100, K, dtype=torch.bool), 0.5)
    first = draws.draw(0, 0)
    assert all(map(torch.equal, first, draws.draw(0, 0)))
    assert not torch.equal(first[1], draws.draw(0, 1)[1])
    assert not torch.equal(first[1], draws.draw(1, 0)[1])


def test_no_image_is_in_two_splits(tissue: Path) -> None:
    """By class lists, an image with k labels would be in both with probability 1 - 0.1^(k - 1), 90 to 99.99 %."""
    parts = [names(opened(tissue, split, val_share=0.2)) for split in ("train", "val", "test")]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert len(parts[0] | parts[1] | parts[2]) == 80
    assert [len([n for n in part if "_u" not in n]) for part in parts] == [42, 12, 6]


def test_slides_stay_together(tissue: Path) -> None:
    parts = [names(opened(tissue, split, slide=r"(slide\d+)_", test_share=0.2)) for split in ("train", "test")]
    slides = [{name.split("_")[0] for name in part} for part in parts]
    assert not slides[0] & slides[1]
    assert len(slides[1]) == 2
    assert len(parts[1]) == 12
    # unlabelled images of slides that are held out are in no split
    assert len([n for n in parts[0] if "_u" in n]) == 18


@pytest.mark.parametrize("slide", [None, r"(slide\d+)_"])
def test_copies_of_an_image_are_in_one_split(slide: str | None, tissue: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under names and masks of their own, and in a kept index."""
    folder = tissue / "labelled"
    first = sorted(folder.glob("*.jpg"))[0]
    for i in range(30, 60):
        (folder / f"slide{i // 6}_{i:02d}.jpg").write_bytes(first.read_bytes())
    for _ in range(2):
        contents = [
            {(folder / name).read_bytes() for name in names(opened(tissue, split, unlabelled=None, slide=slide))}
            for split in ("train", "test")
        ]
        assert not contents[0] & contents[1]
    assert "30 images are copies of others" in caplog.text


def test_the_split_has_the_same_mix_of_classes() -> None:
    rng = np.random.default_rng(0)
    kinds = [frozenset(k for k in range(K) if rng.random() < share) or frozenset({0}) for share in (0.5, 0.1) * 2000]
    groups = {f"{i}": [kind] for i, kind in enumerate(kinds)}
    test = held_out(groups, 0.1, "test")
    assert abs(len(test) - 400) <= 1
    for k in range(K):
        share = sum(k in groups[name][0] for name in test) / sum(k in kind for kind in kinds)
        assert abs(share - 0.1) < 0.01, (k, share)


def of_the_original() -> torch.Tensor:
    """(90726, 5) bool: labelled images with the class counts of DiffInfinite's skin data, drawn at random."""
    rng, totals = np.random.default_rng(0), (64877, 64491, 42494, 40548, 45956)
    present = np.zeros((90726, 5), dtype=bool)
    for k, total in enumerate(totals):
        present[rng.choice(len(present), total, replace=False), k] = True
    empty, donors = (~present.any(1)).nonzero()[0], (present.sum(1) > 1).nonzero()[0]
    for image, donor in zip(empty, rng.permutation(donors), strict=False):  # each labelled image has a class
        k = present[donor].argmax()
        present[donor, k], present[image, k] = False, True
    return torch.from_numpy(present)


def test_class_counts_of_the_original(caplog: pytest.LogCaptureFixture) -> None:
    """Its log has train [58389, 58041, 38244, 36493, 41360] and test [6488, 6450, 4250, 4055, 4596]: an image counts in
    each class that it contains, and nine tenths of each class's list train. A split by images is the same to 1 %."""
    present = of_the_original()
    totals = present.sum(0)
    train = (totals * 9 // 10).tolist()
    assert train == [58389, 58041, 38244, 36493, 41360]
    assert (totals - totals * 9 // 10).tolist() == [6488, 6450, 4250, 4055, 4596]
    groups = {f"{i:05d}": [frozenset(row.nonzero().flatten().tolist())] for i, row in enumerate(present)}
    test = torch.tensor([int(name) for name in held_out(groups, 0.1, "test")])
    kept = torch.ones(len(present), dtype=torch.bool)
    kept[test] = False
    assert present[kept].sum(0).tolist() == pytest.approx(train, rel=0.01)
    assert present[test].sum(0).tolist() == pytest.approx([6488, 6450, 4250, 4055, 4596], rel=0.01)
    tissue = ProceduralTissue("train", size=32)
    with caplog.at_level("INFO"):
        tissue._take(present[kept])
    assert f"train: {int(kept.sum())} images, 0 unlabelled, class counts {present[kept].sum(0).tolist()}" in caplog.text


def test_unconditional_draws_of_the_original() -> None:
    """ "Class size: 214413" in its log: the images of class 0 and the 156,024 unlabelled ones."""
    present = torch.zeros(58389 + 58041 + 156024, 5, dtype=torch.bool)
    present[:58389, 0] = True
    present[58389 : 58389 + 58041, 1:] = True
    assert len(ClassDraws(present, 0.5).unconditional) == 214413


def test_a_split_that_gets_no_image_is_refused(tmp_path: Path) -> None:
    for i in range(3):
        write_pair(tmp_path / "labelled", f"{i}", np.full((SIDE, SIDE), 1, np.uint8), i)
    with pytest.raises(BadInput, match="test_share: expected a share that gives the test split an image, got 0.1 of 3"):
        opened(tmp_path, "test", unlabelled=None, p_cond=None)


def test_the_index_is_built_once_and_again_when_a_mask_changes(tissue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Path] = []
    count = mask_files._count
    monkeypatch.setattr(mask_files, "_count", lambda path, classes: counted.append(path) or count(path, classes))
    first = opened(tissue)
    assert len(counted) == 60
    assert opened(tissue).fingerprint() == first.fingerprint()
    assert len(counted) == 60
    write_pair(tissue / "labelled", "slide0_00", np.full((SIDE, SIDE), 4, np.uint8), 7)
    assert opened(tissue).fingerprint() != first.fingerprint()
    assert len(counted) == 120


def test_class_counts_and_cutoffs_are_printed(tissue: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        dataset = opened(tissue)
    counts = dataset._present.sum(0).tolist()
    assert f"train: 74 images, 20 unlabelled, class counts {counts}" in caplog.text
    assert "train: draws by p_cond 0.5, cutoffs [0.5, 0.625, 0.75, 0.875, 1.0]" in caplog.text
    masks = [np.array(Image.open(mask_files.mask_of(path))) for path in dataset._paths[:54]]
    assert counts == [sum(int((mask == k).any()) for mask in masks) for k in range(K)]


def test_samples_come_with_their_masks_or_none(tissue: Path) -> None:
    """In a stream: unconditional draws and unlabelled images have the null mask, all others that of their file."""
    dataset = opened(tissue)
    stream = LabeledImageDatasetWrapper(dataset, ValTransform(dataset.spec), {}, seed=0, shuffle=True)
    dropped = dataset.dropped(0, 0)
    assert dropped is not None
    for position in range(len(stream)):
        sample = stream[position]
        mask = sample.condition.mask if isinstance(sample.condition, MaskCondition) else None
        path = Path(str(sample.img_path))
        if dropped[position]:
            assert mask is not None
            assert (mask == K).all()
        else:
            assert mask is not None
            assert np.array_equal(mask, np.array(Image.open(mask_files.mask_of(path))))
    assert 0.3 < dropped.float().mean() < 0.7


def test_cached_latents_meet_the_same_masks(tissue: Path) -> None:
    dataset = opened(tissue)
    for i in (0, 30, len(dataset) - 1):
        whole, part = dataset[i], dataset.without_image(i)
        assert part.img is None
        assert part.img_path == whole.img_path
        assert torch.equal(part.condition.mask, whole.condition.mask)  # type: ignore[union-attr]


def test_a_mask_is_turned_with_its_image(tissue: Path) -> None:
    dataset = opened(tissue)
    transform, sample = DihedralTransform(dataset.spec), dataset[4]
    marked = sample.condition.mask.expand(3, -1, -1).to(torch.uint8)  # type: ignore[union-attr]
    seen = set()
    for choice in range(8):
        turned = transform.variant(type(sample)(img=marked, condition=sample.condition), torch.tensor(choice))
        assert torch.equal(turned.require_img()[0].long(), turned.condition.mask)  # type: ignore[union-attr]
        seen.add(turned.require_img().numpy().tobytes())
    assert len(seen) == 8


def test_only_one_place_drops(tissue: Path) -> None:
    from rqvae.models.stage2.diffusion import LatentDiffusion
    from rqvae.models.stage2.unet import UNet

    def make(drop: float, p_cond: float | None) -> LatentDiffusion:
        spec = opened(tissue, p_cond=p_cond).spec

        def unet(shape: tuple[int, ...], data: object) -> UNet:
            return UNet(shape, data, width=8, multipliers=[1], attention=[], norm_groups=4)  # type: ignore[arg-type]

        return LatentDiffusion((3, SIDE, SIDE), spec, backbone=unet, drop_condition=drop)

    with pytest.raises(BadInput, match="stage2.drop_condition: expected 0, as the dataset drops conditions"):
        make(0.1, 0.5)
    assert make(0.0, 0.5).knows_null
    assert make(0.1, None).knows_null


def spoil(action: str, tissue: Path) -> None:
    """Make one thing of the folder wrong."""
    folder, first = tissue / "labelled", tissue / "labelled" / "slide0_00_mask.png"
    actions: dict[str, Callable[[], object]] = {
        "id": lambda: Image.fromarray(np.full((SIDE, SIDE), K, np.uint8)).save(first),
        "no mask": lambda: first.unlink(),
        "size": lambda: Image.fromarray(np.zeros((SIDE, 2 * SIDE), np.uint8)).save(first),
        "rgb": lambda: Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(first),
        "16 bit": lambda: Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(first),
        "broken": lambda: first.write_bytes(first.read_bytes()[:45]),
        "no image": lambda: (folder / "slide0_00.jpg").unlink(),
        "twin name": lambda: (tissue / "more" / "slide3_18.jpg").write_bytes(b"x"),
        "twin content": lambda: (tissue / "more" / "z.jpg").write_bytes((folder / "slide3_18.jpg").read_bytes()),
        "index": lambda: (folder / mask_files.INDEX_NAME).write_text('{"key": 1'),
    }
    actions[action]()


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("id", r"slide0_00_mask.png: expected class numbers below 5 \(num_classes\), got 5"),
        ("no mask", r"slide0_00.jpg: expected a mask slide0_00_mask.png beside it, got none"),
        ("size", r"slide0_00_mask.png: expected 16 x 16 as its image, got 16 x 32"),
        ("rgb", r"slide0_00_mask.png: expected one channel of 8-bit class numbers, got colours \(mode RGB\)"),
        ("16 bit", r"slide0_00_mask.png: expected one channel of 8-bit class numbers, got more than 8 bits"),
        ("broken", r"slide0_00_mask.png: expected a readable mask"),
        ("no image", r"slide0_00_mask.png: expected the image of this mask beside it, got none"),
        ("twin name", r"more.slide3_18.jpg: expected an image that is not in .*labelled too, got slide3_18.jpg of"),
        ("twin content", r"more.z.jpg: expected an image that is not in .*labelled too, got the content of slide3_18"),
        ("index", r"mask_index.json: expected"),
    ],
)
def test_bad_folders_are_told_in_a_line(action: str, words: str, tissue: Path) -> None:
    spoil(action, tissue)
    with pytest.raises(BadInput, match=words) as told:
        opened(tissue)
    assert "\n" not in str(told.value)


def test_a_class_without_images_is_named(tissue: Path) -> None:
    for path in (tissue / "labelled").glob("*_mask.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 3, 1, mask).astype(np.uint8)).save(path)
    with pytest.raises(BadInput, match="class fat: expected at least one image of the train split to draw, got none"):
        opened(tissue, names=["unknown", "fibres", "nuclei", "fat", "blood"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"p_cond": 1.5}, r"p_cond: expected a number in \[0, 1\], got 1.5"),
        ({"p_cond": 1.0}, "p_cond: expected less than 1, as 20 unlabelled images are never drawn"),
        ({"test_share": 0.0}, "test_share, val_share: expected shares that leave some to train"),
        ({"slide": "slide"}, "slide: expected a regular expression with a group"),
        ({"slide": "(a)|b"}, "slide: expected a match of .* in every file's name, got slide0_00.jpg"),
        ({"names": ["a"]}, r"names: expected 5 \(num_classes\), got 1"),
        ({"unknown_class": 5}, "unknown_class: expected null or a number below 5"),
        ({"unlabelled": "/nowhere"}, "/nowhere: expected a folder of images, got no such folder"),
    ],
)
def test_bad_settings(arguments: dict[str, object], words: str, tissue: Path) -> None:
    with pytest.raises(BadInput, match=words):
        opened(tissue, **arguments)


def test_masks_as_pictures() -> None:
    picture = coloured(np.arange(6, dtype=np.int64).reshape(1, 2, 3), K)
    white, orange, cyan, red, green = (255, 255, 255), (255, 165, 0), (0, 255, 255), (255, 0, 0), (0, 128, 0)
    assert [tuple(p) for p in picture[0].reshape(3, 6).T.tolist()] == [
        white,
        orange,
        cyan,
        red,
        green,
        (128, 128, 128),
    ]
    with pytest.raises(BadInput, match=r"mask: expected numbers in \[0, 5\]"):
        coloured(np.full((1, 1, 1), 6), K)


def test_stains_are_those_of_scikit_image() -> None:
    """`rgb2hed` of scikit-image on its own section, and the section's mask has all three classes."""
    from skimage.color import rgb2hed
    from skimage.data import immunohistochemistry

    section = immunohistochemistry()
    assert np.abs(stain_densities(section) - rgb2hed(section)).max() < 1e-9
    shares = torch.bincount(stain_mask(section).flatten()) / 512**2
    assert shares.min() > 0.1


@pytest.mark.parametrize("kind", [IHCTissue, ProceduralTissue])
def test_embedded_tissue(kind: type) -> None:
    """The same sample twice, other ones in other splits, masks of all classes."""
    train, test = kind("train", size=32), kind("test", size=32)
    train.open(), test.open()
    assert torch.equal(train[3].img, train[3].img)
    assert not torch.equal(train[3].img, test[3].img)
    assert train[3].img.dtype == torch.uint8
    assert train[3].img.shape == (3, 32, 32)
    seen = torch.cat([train[i].condition.mask.flatten() for i in range(40)]).unique()
    assert seen.tolist() == list(range(train.num_classes))


def test_procedural_tissue_hides_some_masks() -> None:
    dataset = ProceduralTissue("train", size=16, images=40, unlabelled=0.25)
    dataset.open()
    null = [bool((dataset[i].condition.mask == 5).all()) for i in range(40)]  # type: ignore[union-attr]
    assert null == [False] * 30 + [True] * 10
    assert not ProceduralTissue("val", size=16, images=40, unlabelled=0.25).labelled < 10
