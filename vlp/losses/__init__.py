"""Losses as pure functions of tensors: no parameters, state, communication or logging.

Every public loss can be imported from here, for example ``from vlp.losses import contrastive_loss``. Each computes in
float32 whatever autocast says, and raises `NonFiniteLoss` naming the input row where its value is not finite.
"""

from vlp.errors import NonFiniteLoss
from vlp.losses.classification import one_hot, sigmoid_cross_entropy, softmax_cross_entropy
from vlp.losses.divergence import jensen_shannon
from vlp.losses.geometry import alignment, modality_gap, uniformity
from vlp.losses.masked import masked_cross_entropy, masked_pixel_loss
from vlp.losses.nce import draw_noise, instance_softmax_loss, log_partition, log_partition_sum, nce_loss
from vlp.losses.npair import n_pair_loss, tuplet_loss
from vlp.losses.pairwise import contrastive_loss, hardest_triplets, mined_triplet_loss, semi_hard_triplets, triplet_loss
from vlp.losses.sigmoid import sigmoid_loss
from vlp.losses.softmax import id_targets, info_nce, soft_info_nce
from vlp.losses.tiled import queue_info_nce, tiled_info_nce, tiled_sigmoid_loss

__all__ = [
    "NonFiniteLoss",
    "alignment",
    "contrastive_loss",
    "draw_noise",
    "hardest_triplets",
    "id_targets",
    "info_nce",
    "instance_softmax_loss",
    "jensen_shannon",
    "log_partition",
    "log_partition_sum",
    "masked_cross_entropy",
    "masked_pixel_loss",
    "mined_triplet_loss",
    "modality_gap",
    "n_pair_loss",
    "nce_loss",
    "one_hot",
    "queue_info_nce",
    "semi_hard_triplets",
    "sigmoid_cross_entropy",
    "sigmoid_loss",
    "soft_info_nce",
    "softmax_cross_entropy",
    "tiled_info_nce",
    "tiled_sigmoid_loss",
    "triplet_loss",
    "tuplet_loss",
    "uniformity",
]
