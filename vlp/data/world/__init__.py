"""A synthetic world of a few coloured shapes in which neither a bag of words nor a colour histogram can match anything.

Scenes 2n and 2n + 1 are a minimal pair: two things have exchanged places, shapes or colours. Every caption of the one
has the words of a caption of the other, in another order; their pictures have the same histogram, pixel for pixel; and
every statement or yes/no question about the one is put about the other too, with the opposite answer. What is left to
tell them apart is which colour belongs to which shape and what stands where: text and picture have to be fused.
"""

from vlp.data.world.folder import make
from vlp.data.world.scenes import Scene, World

__all__ = ["Scene", "World", "make"]
