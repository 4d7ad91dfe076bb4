import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_lab.errors import InputError
from tokenizers_lab.eval.grid import PAPER, save_grid


@pytest.mark.parametrize(("n", "size", "columns"), [(5, (16, 24), 3), (8, (200, 200), 8), (1, (64, 64), 8)])
def test_every_tile_is_where_the_geometry_says_pixel_for_pixel(tmp_path, n, size, columns):
    generator = torch.Generator().manual_seed(0)
    originals, reconstructions = (torch.randint(0, 256, (n, 3, *size), generator=generator) / 255 for _ in range(2))
    geometry = save_grid(originals, reconstructions, tmp_path / "grid.png", columns=columns)
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert picture.shape[:2][::-1] == geometry.size()
    scale = geometry.tile[0] // size[1]
    assert geometry.tile == (size[1] * scale, size[0] * scale) and geometry.tile[1] >= 128
    covered = np.zeros(picture.shape[:2], dtype=bool)
    for label, images in enumerate((originals, reconstructions)):
        for i, image in enumerate(images):
            left, top = geometry.box(i, label)
            where = np.s_[top : top + geometry.tile[1], left : left + geometry.tile[0]]
            expected = (image * 255).round().byte().permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
            assert (picture[where] == expected).all()
            assert not covered[where].any()
            covered[where] = True
    outside = picture[:, geometry.origin[0] :][~covered[:, geometry.origin[0] :]]
    assert (outside == PAPER).all()
    assert (picture[:, : geometry.origin[0]] != PAPER).any(), "labels at the left"
    assert geometry.box(0, 1)[1] > geometry.box(0, 0)[1], "originals above"


def test_wrong_images_are_refused(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    for bad in (images[:1], torch.rand(2, 3, 8, 9), images * float("nan")):
        with pytest.raises(InputError):
            save_grid(images, bad, tmp_path / "grid.png")
    with pytest.raises(InputError):
        save_grid(torch.rand(0, 3, 8, 8), torch.rand(0, 3, 8, 8), tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()
