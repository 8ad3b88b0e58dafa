"""Samples with the images of other samples: a cycle over the usable ones, whatever batch asks for them."""

import pytest
import torch

from vlp.data.by_image import AnnotatedImage, AnnotatedImageDataset
from vlp.data.other_images import OtherImages, exchange
from vlp.data.stream import EvalDataset
from vlp.errors import UserError


class Numbers:
    """A data set whose image at each position is its number, without some."""

    def __init__(self, size, bad=()):
        self.size, self.bad = size, bad

    def __len__(self):
        return self.size

    def __getitems__(self, positions):
        usable = [(torch.tensor([n + 1]), f"caption {n}") for n in positions if n not in self.bad]
        return usable, [{"key": n} for n in positions if n in self.bad]

    def with_image_of(self, sample, other):
        return EvalDataset.with_image_of(self, sample, other)


def images(dataset, *batches):
    return [(int(image), caption) for batch in batches for image, caption in dataset.__getitems__(batch)[0]]


@pytest.mark.parametrize("size", [2, 3, 50])
def test_every_image_is_shown_once_with_another_caption(size):
    found = images(OtherImages(Numbers(size), 3), range(size))
    assert [caption for _, caption in found] == [f"caption {n}" for n in range(size)]
    assert sorted(image for image, _ in found) == list(range(1, size + 1))
    assert all(image != n + 1 for n, (image, _) in enumerate(found))


def test_exchange_depends_on_the_seed_and_not_on_the_batches():
    whole = images(OtherImages(Numbers(20), 3), range(20))
    assert images(OtherImages(Numbers(20), 3), [*range(0, 20, 3)], [5, 4]) == [*whole[::3], whole[5], whole[4]]
    assert images(OtherImages(Numbers(20), 4), range(20)) != whole


def test_unusable_samples_are_skipped_and_lend_no_image():
    dataset = OtherImages(Numbers(9, bad=(0, 4, 5)), 1)
    samples, bad = dataset.__getitems__(range(9))
    assert [record["key"] for record in bad] == [0, 4, 5] and len(dataset) == 9
    assert sorted(int(image) for image, _ in samples) == [2, 3, 4, 7, 8, 9]
    assert all(f"caption {int(image) - 1}" != caption for image, caption in samples)


def test_only_usable_image_becomes_black():
    assert images(OtherImages(Numbers(3, bad=(0, 2)), 1), [0, 1, 2]) == [(0, "caption 1")]


def test_error_of_a_worker_is_returned():
    class Broken(Numbers):
        def __getitems__(self, positions):
            return UserError("the shard is gone")

    assert str(OtherImages(Broken(2), 0).__getitems__([1])) == "the shard is gone"


def test_annotations_keep_the_size_of_their_own_image():
    own = AnnotatedImage([(torch.ones(3), (10, 20))], ["line"])
    other = AnnotatedImage([(torch.full((3,), 2.0), (30, 40))], ["other line"])
    ((pixels, size),) = AnnotatedImageDataset.with_image_of(None, own, other).images
    assert pixels.tolist() == [2.0] * 3 and size == (10, 20)
    assert exchange(own.images[0], None)[0].tolist() == [0.0] * 3
