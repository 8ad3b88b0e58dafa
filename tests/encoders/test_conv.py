"""The convolutional tower: shapes, pooling, weights of a run, and wrong sizes."""

import pytest
import torch

from vlp.encoders.conv import ConvImage
from vlp.errors import UserError


@pytest.mark.parametrize("size, grid", [(64, (8, 8)), ((40, 72), (5, 9)), (65, (9, 9))])
def test_tokens_are_the_grid_after_its_maximum(size, grid):
    tower = ConvImage(image_size=size).build().eval()
    height, width = tower.preprocess.size
    tokens = tower(torch.randn(2, 3, height, width))
    assert tower.grid == grid and tokens.shape == (2, 1 + grid[0] * grid[1], tower.width)
    assert torch.equal(tokens[:, 0], tokens[:, 1:].amax(1))


def test_rows_of_the_grid_follow_the_image():
    tower = ConvImage().build().eval()
    image = torch.zeros(1, 3, 64, 64)
    changed = image.clone()
    changed[..., 0:8, 56:64] = 1  # the cell at the end of the first row
    difference = (tower(changed) - tower(image))[0, 1:].norm(dim=1).view(8, 8)
    assert divmod(difference.argmax().item(), 8) in {(0, 7), (0, 6), (1, 7)}
    assert difference[4:, :4].max() == 0  # out of reach


def test_strides_must_belong_to_channels():
    with pytest.raises(UserError, match="give as many strides as channels"):
        ConvImage(channels=(8, 8), strides=(2,)).build()
