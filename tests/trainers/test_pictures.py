import numpy as np
import torch

from trainers.pictures import GAP, grid


def test_pictures_lie_in_rows_with_white_between() -> None:
    pixels = torch.randint(0, 200, (5, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    laid = np.asarray(grid(pixels, columns=3))
    assert laid.shape == (2 * 4 + GAP, 3 * 6 + 2 * GAP, 3)
    np.testing.assert_array_equal(laid[4 + GAP :, 6 + GAP : 12 + GAP], pixels[4].numpy())
    assert (laid[4 : 4 + GAP] == 255).all()
    assert (laid[4 + GAP :, 12 + GAP :] == 255).all()
