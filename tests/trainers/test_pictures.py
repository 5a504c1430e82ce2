import numpy as np
import torch

from trainers.pictures import GAP, grid


def test_captions_stand_below_their_pictures() -> None:
    pixels = torch.full((3, 64, 64, 3), 90, dtype=torch.uint8)
    plain = np.asarray(grid(pixels, columns=2, captions=["", "", ""]))
    words = ["Generate an image with a polyp in the lower-center.", "wordwithoutend" * 40, "a polyp"]
    laid = np.asarray(grid(pixels, columns=2, captions=words))
    assert plain.shape[1] == laid.shape[1] == 2 * 128 + GAP, "enlarged until words fit"
    below = (laid.shape[0] + GAP) // 2 - GAP - 128
    assert below > 3 * 11
    for row, column in ((0, 0), (0, 1), (1, 0)):
        top, left = row * (128 + below + GAP), column * (128 + GAP)
        assert (laid[top : top + 128, left : left + 128] == 90).all(), "no letter lies on a picture"
        assert (laid[top + 128 : top + 128 + below, left : left + 128] < 100).any(), "it has its words"
    assert (laid[:, 128 : 128 + GAP] == 255).all(), "no line runs into the next picture"
    assert (laid[128 + below + GAP :, 128 + GAP :] == 255).all()


def test_pictures_lie_in_rows_with_white_between() -> None:
    pixels = torch.randint(0, 200, (5, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    laid = np.asarray(grid(pixels, columns=3))
    assert laid.shape == (2 * 4 + GAP, 3 * 6 + 2 * GAP, 3)
    np.testing.assert_array_equal(laid[4 + GAP :, 6 + GAP : 12 + GAP], pixels[4].numpy())
    assert (laid[4 : 4 + GAP] == 255).all()
    assert (laid[4 + GAP :, 12 + GAP :] == 255).all()
