"""Numbers of objectives and models have limits, which are checked before anything is built."""

import pytest

from vlp.encoders.fusion import Fusion
from vlp.encoders.mome import Mome
from vlp.errors import UserError
from vlp.models.dual import Dual
from vlp.models.vlmo import Vlmo
from vlp.objectives.answer import AnswerGeneration
from vlp.objectives.assignment import TextAssignment
from vlp.objectives.barlow_twins import BarlowTwins
from vlp.objectives.byol import Byol, Predictor
from vlp.objectives.classification import Classification
from vlp.objectives.cutoff import Cutoff
from vlp.objectives.dcl import Dcl
from vlp.objectives.geometry import Alignment, Uniformity
from vlp.objectives.instance import InstanceDiscrimination
from vlp.objectives.itc import ImageTextContrast, MomentumContrast, SigmoidContrast
from vlp.objectives.itm import ImageTextMatching
from vlp.objectives.masking import TextMasking
from vlp.objectives.mim import MaskedImage
from vlp.objectives.mlm import MaskedText
from vlp.objectives.moco import Moco
from vlp.objectives.pairwise import NPair, PairContrast, Triplet, Tuplet
from vlp.objectives.sentence import Cert, ESimCse, SimCse
from vlp.objectives.simclr import SimClr
from vlp.objectives.vicreg import VicReg
from vlp.specs.fields import check_limits

OUTSIDE = [
    (AnswerGeneration(distill=1.4), "distill is 1.4"),
    (MaskedText(distill=1.4), "distill is 1.4"),
    (MaskedText(ramp_epochs=-1.0), "ramp_epochs is -1.0"),
    (TextAssignment(temperature=0.0), "temperature is 0.0; set it above 0"),
    (TextAssignment(neither=1.5), "neither is 1.5; set it to at most 1"),
    (BarlowTwins(off_diagonal=-1.0), "off_diagonal"),
    (Byol(Predictor(hidden_size=0)), "predictor.hidden_size"),
    (Classification(label_smoothing=1.5), "label_smoothing is 1.5"),
    (Cutoff(ratio=1.0), "ratio is 1.0; set it below 1"),
    (Cutoff(copies=-1), "copies"),
    (Dcl(temperature=0.0), "temperature"),
    (Alignment(alpha=0.0), "alpha"),
    (Uniformity(t=0.0), "t is 0.0"),
    (InstanceDiscrimination(temperature=0.0), "temperature"),
    (InstanceDiscrimination(noise=0), "noise is 0; set it to at least 1"),
    (InstanceDiscrimination(bank_momentum=1.0), "bank_momentum is 1.0; set it below 1"),
    (ImageTextContrast(tile_rows=0), "tile_rows is 0; set it to at least 1"),
    (SigmoidContrast(tile_rows=0), "tile_rows"),
    (MomentumContrast(queue_size=0), "queue_size is 0; set it to at least 1"),
    (MomentumContrast(distill=1.5), "distill is 1.5; set it to at most 1"),
    (ImageTextMatching(epsilon=-1.0), "epsilon is -1.0; set it to at least 0"),
    (TextMasking(probability=1.5), "probability is 1.5; set it to at most 1"),
    (TextMasking(capacity=-0.1), "capacity"),
    (MaskedText(masking=TextMasking(probability=1.5)), "masking.probability is 1.5"),
    (MaskedImage(share=1.0), "share is 1.0; set it below 1"),
    (MaskedImage(min_patches=0), "min_patches"),
    (MaskedImage(min_aspect=0.0), "min_aspect is 0.0; set it above 0"),
    (Moco(queue_size=0), "queue_size"),
    (Moco(groups=0), "groups"),
    (Moco(temperature=0.0), "temperature"),
    (Triplet(margin=-1.0), "margin"),
    (PairContrast(num_others=0), "num_others"),
    (Tuplet(num_negatives=0), "num_negatives"),
    (NPair(l2=-1.0), "l2"),
    (SimCse(temperature=0.0), "temperature"),
    (ESimCse(queue_size=0), "queue_size"),
    (Cert(queue_size=0), "queue_size"),
    (SimClr(temperature=0.0), "temperature"),
    (VicReg(variance=-1.0), "variance"),
    (Dual(temperature_min=0.0), "temperature_min is 0.0; set it above 0"),
    (Vlmo(Mome(drop_path=1.0)), "encoder.drop_path"),
    (Fusion(layers=0), "layers is 0; set it to at least 1"),
]


@pytest.mark.parametrize(("spec", "complaint"), OUTSIDE, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_number_out_of_its_limits_is_refused_by_name(spec, complaint):
    check_limits(type(spec)() if type(spec) is not Dual else Dual())
    with pytest.raises(UserError, match=complaint):
        check_limits(spec)
