"""Image towers: any timm model, its pooled token first, with the normalisation that its weights were trained with.

B batch, H and W pixels, P positions of the last grid, D width.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, replace

import timm
import torch
from timm.layers import to_2tuple
from timm.models import group_parameters
from torch import Tensor, nn

from vlp.data.preprocess import Interpolation, Preprocess, Triple
from vlp.encoders.activation_checkpointing import Checkpointing, checkpoint_blocks
from vlp.errors import UserError
from vlp.weights import reading
from vlp.weights.reading import Grid, LoadReport
from vlp.weights.run import is_run, read_run, run_spec

# Tables of relative positions that timm's own no_weight_decay() does not name in every family.
RELATIVE_POSITIONS = ("*relative_position_bias_table", "*.rel_pos.*", "*.attention_biases")


@dataclass(frozen=True)
class TimmImage:
    """An image tower by its timm name.

    Args:
        weights: None = random; "timm" = timm's own download; else a file, ``pip:PACKAGE/sub/path``, or the folder of a
            run, whose newest image tower it then is.
        image_size: pixels, one number or (H, W); None = what the weights were trained at, else positions are resized.
        mean: None, as std and interpolation: what timm, or the run, says about this model.
        drop_path: largest rate of dropped residual branches, growing linearly with depth.
        head_conv: keep the 1x1 convolution, norm and activation between the last block and the classifier of
            EfficientNet and MobileNet. ALIGN leaves it out ("global pooling, without training the 1x1 conv in the
            classification head"): the width is then the last block's, 640 instead of 2560 for B7. Others have none.
    """

    name: str
    weights: str | None = None
    image_size: int | tuple[int, int] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: Interpolation | None = None
    drop_path: float = 0.0
    head_conv: bool = False

    def resolved(self) -> TimmImage:
        """The same tower with size, mean, std and interpolation filled in; reads no weights.

        Raises:
            UserError: if timm has no such model, or the model's own interpolation is one that we do not have.
        """
        cfg = self._timm_cfg()
        if is_run(self.weights):
            ran = run_spec(self.weights, "image")
            cfg = replace(
                cfg, input_size=(3, *ran.image_size), mean=ran.mean, std=ran.std, interpolation=ran.interpolation
            )
        interpolation = self.interpolation or cfg.interpolation or "bicubic"
        if interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"{self.name} asks for interpolation {interpolation!r}; set it to bicubic or bilinear")
        return replace(
            self,
            image_size=tuple(to_2tuple(self.image_size or cfg.input_size[1:])),
            mean=tuple(self.mean or cfg.mean),
            std=tuple(self.std or cfg.std),
            interpolation=interpolation,
        )

    def build(self, load_weights: bool = True) -> TimmTower:
        """The tower, without a classifier.

        Args:
            load_weights: False = leave the parameters random whatever ``weights`` says: a checkpoint follows.

        Raises:
            UserError: if the name, the size or the weights do not fit, or a download fails.
        """
        spec, cfg = self.resolved(), self._timm_cfg()
        size = {"img_size": spec.image_size} if cfg.fixed_input_size else {}
        model = self._create(size)
        patch = to_2tuple(getattr(getattr(model, "patch_embed", None), "patch_size", 1))
        if size and any(pixels % side for pixels, side in zip(spec.image_size, patch)):
            raise UserError(f"{self.name} cuts patches of {patch}; set image_size to multiples, not {spec.image_size}")
        dropped = () if self.head_conv else drop_head_conv(model)
        if (pooled := getattr(model, "head_hidden_size", model.num_features)) != model.num_features:
            cure = "set head_conv=False" if self.head_conv else "choose another model"
            raise UserError(f"{self.name} pools to width {pooled}, but its grid has {model.num_features}; {cure}")
        report = None
        if load_weights and self.weights:
            heads = (cfg.classifier,) if isinstance(cfg.classifier, str) else tuple(cfg.classifier or ())
            report = reading.load(model, self._state(model, size), ignored=heads + dropped, grids=position_grids(model))
        return TimmTower(model, Preprocess(spec.image_size, spec.mean, spec.std, spec.interpolation), report)

    def _create(self, size: dict) -> nn.Module:
        rate = {"drop_path_rate": self.drop_path}  # always, as some models drop 10 % unless told not to
        try:
            return timm.create_model(self.name, num_classes=0, **size, **rate)
        except TypeError as error:  # a model that cannot drop paths
            if self.drop_path:
                raise UserError(f"{self.name} cannot be built with drop_path; set it to 0 ({error})") from error
            return timm.create_model(self.name, num_classes=0, **size)
        except AssertionError as error:
            raise UserError(f"timm cannot build {self.name} for images of {size}: {error}") from error

    def _timm_cfg(self):
        if not timm.is_model(self.name.split(".")[0]):
            close = difflib.get_close_matches(self.name, timm.list_models(), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() has the names"
            raise UserError(f"timm has no model {self.name!r}; {hint}")
        try:
            return timm.get_pretrained_cfg(self.name) or timm.models.PretrainedCfg()
        except RuntimeError as error:
            raise UserError(f"timm has no model {self.name!r}: {error}") from error

    def _state(self, model: nn.Module, size: dict) -> dict[str, Tensor]:
        if self.weights == "timm":
            # At its own size where `load` can resize the positions and report it; relative tables only timm can resize.
            size = {} if position_grids(model) else size
            try:
                return timm.create_model(self.name, pretrained=True, num_classes=0, **size).state_dict()
            except Exception as error:  # what a failed download raises depends on the hub client
                reason = " ".join(str(error).split())
                raise UserError(
                    f"cannot fetch timm's weights of {self.name} ({reason}); set weights to a file"
                ) from error
        if is_run(self.weights):
            return read_run(self.weights, "image")
        state = reading.read_weights(self.weights)
        if "_conv_stem.weight" in state:
            return reading.from_efficientnet_pytorch(state, [len(stage) for stage in model.blocks])
        return state


def drop_head_conv(model: nn.Module) -> tuple[str, ...]:
    """Take the 1x1 convolution in front of the classifier out of a timm model, and name the modules that went.

    EfficientNet has it before the pooling (``conv_head``, ``bn2``), MobileNetV3 behind (``conv_head``, ``norm_head``,
    ``act2``). A model without one is left as it is.
    """
    if not isinstance(getattr(model, "conv_head", None), nn.Conv2d):
        return ()
    after_pooling = hasattr(model, "norm_head")
    names = ("conv_head", "norm_head", "act2") if after_pooling else ("conv_head", "bn2")
    if not after_pooling:
        model.num_features = model.conv_head.in_channels
    model.head_hidden_size = model.num_features
    for name in names:
        setattr(model, name, nn.Identity())
    return names


def position_grids(model: nn.Module) -> dict[str, Grid]:
    """Which of a timm model's tables are positions of a grid of patches, by name; none where it has no such table."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or getattr(model, "pos_embed", None) is None:
        return {}
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
    return {"pos_embed": Grid(tuple(grid), prefix)}


def timm_layer_ids(model: nn.Module) -> dict[str, int]:
    """Depth of each parameter as timm groups them: stem 0, blocks 1 to L, the final norm L, any pooling head L + 1."""
    if not hasattr(model, "group_matcher"):
        raise UserError(f"timm does not say which layers {type(model).__name__} has; set layer_decay to 1")
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


def timm_undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that timm excludes from weight decay, and of all tables of relative positions."""
    patterns = [*getattr(model, "no_weight_decay", set)(), *RELATIVE_POSITIONS]
    return {name for name, _ in model.named_parameters() if any(fnmatch.fnmatch(name, p) for p in patterns)}


class TimmTower(nn.Module):
    """A timm model as a sequence of tokens, the pooled one first.

    Token 0 is what the model itself pools: the class token (the mean of class and distillation token in a distilled
    DeiT), the mean of the grid, or attention pooling (SigLIP). The others are the grid of the last layer, row by row.
    Class, distillation and register tokens take part inside the model and are left out of the grid.

    Args:
        model: a timm model without classifier.
        preprocess: what its input must look like.
        report: what loading its weights did, if any were loaded.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, report: LoadReport | None = None):
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.report = report
        self.width: int = model.num_features

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to (B, 1 + P, D)."""
        features = self.model.forward_features(image)
        pooled = self.model.forward_head(features, pre_logits=True)
        if features.ndim == 3:
            grid = features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            grid = features.flatten(1, 2)
        else:
            grid = features.flatten(2).mT
        return torch.cat([pooled[:, None], grid], dim=1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the tokens behind the pooled one, for pictures of the size that `preprocess` makes."""
        stride = self.model.feature_info[-1]["reduction"]
        return tuple(-(-side // stride) for side in self.preprocess.size)

    def layer_ids(self) -> dict[str, int]:
        """Parameter name to depth: see `timm_layer_ids`."""
        return {f"model.{name}": depth for name, depth in timm_layer_ids(self.model).items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights: class tokens, position embeddings, relative position tables."""
        return {f"model.{name}" for name in timm_undecayed(self.model)}

    def set_activation_checkpointing(self, how: Checkpointing) -> None:
        """See `vlp.encoders.activation_checkpointing`; "cheap" is for models with patches and blocks.

        Gradients stay as they are, but a BatchNorm counts each batch twice in its running statistics.

        Raises:
            UserError: if this model cannot.
        """
        if hasattr(self.model, "patch_embed") and hasattr(self.model, "blocks"):
            return checkpoint_blocks(self.model.blocks, how)
        if how == "cheap":
            raise UserError(f"{type(self.model).__name__} has no blocks of matrix products; set it to full, or none")
        try:
            return self.model.set_grad_checkpointing(how == "full")
        except (AssertionError, AttributeError) as error:
            raise UserError(f"{type(self.model).__name__} cannot checkpoint activations; turn that off") from error
