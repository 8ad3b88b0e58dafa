"""Synthetic scenes of coloured shapes that neither a bag of words nor a colour histogram can match.

Scenes 2n and 2n + 1 are a minimal pair: two things exchange places, shapes or colours. Every caption of one scene has the
words of a caption of the other in a different order. Their images have exactly the same histogram. Every statement or
yes/no question about one scene is also asked about the other, with the opposite answer. The scenes differ only in which
colour belongs to which shape and in the places of the things, so a model must fuse text and image.
"""

from vlp.data.world.folder import make, make_single
from vlp.data.world.scenes import Scene, World

__all__ = ["Scene", "World", "make", "make_single"]
