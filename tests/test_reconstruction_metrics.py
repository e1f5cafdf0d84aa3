"""PSNR and SSIM against scikit-image, which we did not write, on real photos."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from rqvae.errors import BadInput
from rqvae.metrics.grids import image_grid
from rqvae.metrics.reconstruction import MAX_PSNR, ReconstructionScores, psnr, ssim, to_8bit_levels, to_uint8

# Sides that are not square, the smallest that SSIM allows, and an odd one.
CROPS = [("astronaut", 96, 160), ("coffee", 121, 64), ("chelsea", 11, 40), ("rocket", 32, 32)]


def photo_pair(name: str, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A crop of a photo and a version that is blurred by shrinking and noisy, (1, 3, H, W) uint8."""
    crop_hwc = getattr(data, name)()[100 : 100 + height, 150 : 150 + width]
    image = torch.from_numpy(np.ascontiguousarray(crop_hwc)).permute(2, 0, 1)[None]
    small = torch.nn.functional.avg_pool2d(image.double(), 2, ceil_mode=True)
    blurred = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return image, (blurred + 8 * noise).round().clamp(0, 255).to(torch.uint8)


def skimage_scores(image: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    a_hwc, b_hwc = (x[0].permute(1, 2, 0).numpy() for x in (image, other))
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity = structural_similarity(a_hwc, b_hwc, data_range=255, channel_axis=2, **wang)
    return peak_signal_noise_ratio(a_hwc, b_hwc, data_range=255), similarity


@pytest.mark.parametrize(("name", "height", "width"), CROPS)
def test_scores_equal_scikit_image(name: str, height: int, width: int) -> None:
    image, other = photo_pair(name, height, width)
    expected_psnr, expected_ssim = skimage_scores(image, other)
    assert expected_psnr < 40
    a, b = other / 255, image / 255  # float32, as the models give them: what is exact must survive it
    levels = to_8bit_levels(a), to_8bit_levels(b)
    assert abs(float(psnr(*levels)) - expected_psnr) < 1e-9
    assert abs(float(ssim(*levels)) - expected_ssim) < 1e-9
    assert abs(float(ssim(a, b)) - expected_ssim) < 1e-6
    assert abs(float(ssim(a, b, dtype=torch.float32)) - expected_ssim) < 1e-4


TABLE = {
    # Noise of 10 levels and JPEG of quality 35: what published numbers mix. Only the first two rows are ours.
    "psnr_rgb_u8": (28.545, 29.178),
    "ssim_wang_rgb_u8": (0.71582, 0.90041),
    "psnr_y": (33.267, 33.187),
    "ssim_uniform_7_sample_covariance": (0.73134, 0.90748),
    "ssim_gaussian_sample_covariance": (0.71529, 0.90020),
    "ssim_wang_y": (0.87401, 0.94866),
    "ssim_wang_grey": (0.80610, 0.93493),
}


def table_pair(column: int) -> tuple[np.ndarray, np.ndarray]:
    """The astronaut at 256 px with noise (0) or as a JPEG (1), (H, W, 3) uint8."""
    image = np.asarray(Image.fromarray(data.astronaut()).resize((256, 256), Image.Resampling.BICUBIC))
    if column == 0:
        noise = np.random.default_rng(0).normal(0, 10, image.shape)
        return image, np.clip(np.round(image + noise), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=35)
    return image, np.asarray(Image.open(file))


@pytest.mark.parametrize("column", [0, 1], ids=["noise", "jpeg"])
def test_conventions_of_the_literature_are_other_numbers(column: int) -> None:
    """Ours are the first two rows; scikit-image's other settings and a luma channel give up to 0.16 more."""
    image, other = table_pair(column)
    a, b = (torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 255 for x in (other, image))
    ours = {"psnr_rgb_u8": float(psnr(a, b)), "ssim_wang_rgb_u8": float(ssim(a, b))}
    luma = [rgb2ycbcr(x)[..., 0] for x in (image, other)]
    grey = [x @ np.array([0.299, 0.587, 0.114]) for x in (image.astype(float), other.astype(float))]
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "data_range": 255}
    wang = {**gaussian, "use_sample_covariance": False}
    theirs = {
        "psnr_y": peak_signal_noise_ratio(*luma, data_range=255),
        "ssim_uniform_7_sample_covariance": structural_similarity(image, other, data_range=255, channel_axis=2),
        "ssim_gaussian_sample_covariance": structural_similarity(image, other, channel_axis=2, **gaussian),
        "ssim_wang_y": structural_similarity(*luma, **wang),
        "ssim_wang_grey": structural_similarity(*grey, **wang),
    }
    for key, value in {**ours, **theirs}.items():
        assert value == pytest.approx(TABLE[key][column], abs=6e-4 if "psnr" in key else 1e-4), key


def test_psnr_of_one_level() -> None:
    """In closed form: an error of one level everywhere is 20 log10(255) dB."""
    image = torch.full((2, 3, 20, 30), 100 / 255)
    assert torch.allclose(
        psnr(to_8bit_levels(image + 1 / 255), to_8bit_levels(image)), torch.tensor(48.130803608679).double()
    )


def test_each_image_has_its_own_score() -> None:
    pairs = [photo_pair(name, 64, 64) for name in ("astronaut", "coffee", "chelsea")]
    images, others = (torch.cat(x) / 255 for x in zip(*pairs, strict=True))
    together = psnr(others, images), ssim(others, images)
    alone = [(psnr(b / 255, a / 255), ssim(b / 255, a / 255)) for a, b in pairs]
    for k in range(3):
        torch.testing.assert_close(together[0][k : k + 1], alone[k][0])
        torch.testing.assert_close(together[1][k : k + 1], alone[k][1])


def test_all_levels_survive_the_way_through_float32_and_halves_go_to_even() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 255), levels)
    assert torch.equal(
        to_uint8(levels.double() / 255 * 2 - 1).unique(), torch.unique((levels.int() * 2 - 255).clamp(min=0))
    )
    assert to_uint8(torch.tensor([0.5, 1.5, 2.5, -9.0, 300.0], dtype=torch.float64) / 255).tolist() == [0, 2, 2, 0, 255]
    assert torch.equal(to_8bit_levels(levels / 255) * 255, levels.double())


def test_identical_images_have_a_finite_score() -> None:
    image, _ = photo_pair("coffee", 32, 48)
    assert psnr(image / 255, image / 255).tolist() == [MAX_PSNR]
    assert ssim(image / 255, image / 255).tolist() == pytest.approx([1.0], abs=1e-12)


def test_ranks_add_up_to_the_mean_of_scikit_image() -> None:
    """Two ranks, one with a batch that is filled up with NaN, and a third without any image."""
    pairs = [photo_pair(name, 40, 56) for name in ("astronaut", "coffee", "chelsea")]
    images, others = (torch.cat(x) / 255 for x in zip(*pairs, strict=True))
    ranks = [ReconstructionScores() for _ in range(3)]
    ranks[0].update(others[:2], images[:2])
    filled = torch.stack([others[2], torch.full_like(others[2], torch.nan)])
    ranks[1].update(filled, images[[2, 2]], valid_b=torch.tensor([True, False]))
    result = ReconstructionScores.result(sum(rank.state() for rank in ranks))
    expected = np.mean([skimage_scores(*pair) for pair in pairs], axis=0)
    assert result == pytest.approx({"psnr": expected[0], "ssim": expected[1], "n": 3}, abs=1e-9)


def test_scores_are_of_the_stored_image() -> None:
    """A reconstruction is clamped and rounded before it is scored, whatever the decoder gives."""
    image, other = photo_pair("astronaut", 32, 32)
    decoder_output = other / 255 + 0.3 / 255
    scores = ReconstructionScores()
    scores.update(torch.where(other == 255, 1.7, decoder_output), image / 255)
    assert ReconstructionScores.result(scores.state())["psnr"] == pytest.approx(
        skimage_scores(image, other)[0], abs=1e-9
    )


def test_a_broken_model_gets_no_score() -> None:
    scores = ReconstructionScores()
    scores.update(torch.full((1, 3, 16, 16), torch.nan), torch.zeros(1, 3, 16, 16))
    assert np.isnan(ReconstructionScores.result(scores.state())["psnr"])


def test_update_does_not_touch_the_host() -> None:
    """On the meta device there is nothing to read: a host sync would raise."""
    scores = ReconstructionScores("meta")
    batch = torch.zeros(4, 3, 16, 24, device="meta")
    scores.update(batch, batch, valid_b=torch.ones(4, dtype=torch.bool, device="meta"))
    assert scores.state().shape == (3,)


def test_bad_input_names_what_is_wrong() -> None:
    with pytest.raises(BadInput, match=r"at least 11x11 pixels, got 10x40"):
        ssim(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))
    with pytest.raises(BadInput, match=r"got \(1, 3, 16, 16\) and \(2, 3, 16, 16\)"):
        psnr(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))
    with pytest.raises(BadInput, match="got none"):
        ReconstructionScores.result(ReconstructionScores().state())
    with pytest.raises(BadInput, match="images: expected uint8"):
        image_grid(np.zeros((1, 3, 4, 4)), 2)


def test_grid_places_images_row_after_row() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 3), np.uint8)
    sheet = image_grid(images, columns=3, gap=1, scale=2)
    assert sheet.shape == (2 * 4 + 1, 3 * 6 + 2, 3)
    corners = [sheet[r * 5, c * 7, 0] for r in range(2) for c in range(3)]
    assert corners == [0, 1, 2, 3, 4, 255]
    assert (sheet[4] == 255).all()
    assert (sheet[:, 6] == 255).all()
