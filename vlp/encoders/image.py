"""Image towers from timm, with the pooled token first and the normalisation that their weights were trained with.

B images, H and W pixels, P tokens of the last grid, D width.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import group_parameters
from torch import Tensor, nn

from vlp.data.preprocess import Interpolation, Preprocess, Triple
from vlp.encoders.activation_checkpointing import Checkpointing, checkpoint_blocks
from vlp.encoders.base import ImageTower, ImageTowerSpec
from vlp.errors import UserError
from vlp.specs.fields import setting
from vlp.weights import reading
from vlp.weights.reading import Grid, LoadReport
from vlp.weights.run import is_run, read_run, tower_spec

# Tables of relative positions that timm's own no_weight_decay() does not name in every architecture.
RELATIVE_POSITIONS = ("*relative_position_bias_table", "*.rel_pos.*", "*.attention_biases")


@dataclass(frozen=True)
class TimmImage(ImageTowerSpec):
    """An image tower by its timm name.

    Args:
        name: Model name, with or without a pretrained tag.
        weights: "timm" downloads timm's own weights. Otherwise a file, ``pip:PACKAGE/sub/path``, or a run folder, whose
            newest image tower is taken. None starts at random.
        image_size: In pixels, one number or (H, W). None is the size that the weights were trained at. Position
            embeddings are resized to any other size.
        mean: Of the pixels, per channel. None, for ``std`` and ``interpolation`` too, takes the value of timm or of the
            run.
        std: Of the pixels, per channel.
        interpolation: For resizing images.
        drop_path: Largest rate of stochastic depth, growing linearly with depth.
        head_conv: Keep the 1x1 convolution, norm and activation between the last block and the classifier of
            EfficientNet and MobileNet. ALIGN drops it ("global pooling, without training the 1x1 conv in the
            classification head"), so that the width is that of the last block, 640 instead of 2560 for B7. No effect on
            other models.
    """

    name: str
    weights: str | None = None
    image_size: int | tuple[int, int] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: Interpolation | None = None
    drop_path: float = setting(0.0, least=0, below=1)
    head_conv: bool = False

    def resolved(self) -> TimmImage:
        """Return the same tower with size, mean, std and interpolation filled in. Reads no weights.

        Raises:
            UserError: if timm has no such model, or the model was trained with an unsupported interpolation.
        """
        cfg = self._timm_cfg()
        if is_run(self.weights):
            trained = tower_spec(self.weights, "image", TimmImage)
            cfg = replace(
                cfg,
                input_size=(3, *trained.image_size),
                mean=trained.mean,
                std=trained.std,
                interpolation=trained.interpolation,
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
        """Build the tower, without a classifier.

        Args:
            load_weights: False leaves the parameters random even where ``weights`` is set.

        Raises:
            UserError: if the name, the size or the weights do not fit, or a download fails.
        """
        spec, cfg = self.resolved(), self._timm_cfg()
        size = {"img_size": spec.image_size} if cfg.fixed_input_size else {}
        model = self._create(size)
        patch = to_2tuple(timm_attribute(timm_attribute(model, "patch_embed"), "patch_size", 1))
        if size and any(pixels % side for pixels, side in zip(spec.image_size, patch)):
            raise UserError(f"{self.name} cuts patches of {patch}; set image_size to multiples, not {spec.image_size}")
        dropped = () if self.head_conv else drop_head_conv(model)
        pooled = timm_attribute(model, "head_hidden_size", model.num_features)
        if pooled != model.num_features:
            advice = "set head_conv=False" if self.head_conv else "choose another model"
            raise UserError(f"{self.name} pools to width {pooled}, but its grid has {model.num_features}; {advice}")
        report = None
        if load_weights and self.weights:
            heads = (cfg.classifier,) if isinstance(cfg.classifier, str) else tuple(cfg.classifier or ())
            grids = timm_position_grids(model)
            report = reading.load(model, self._state(model, size), ignored=heads + dropped, grids=grids)
        return TimmTower(model, Preprocess(spec.image_size, spec.mean, spec.std, spec.interpolation), report)

    def _create(self, size: dict) -> nn.Module:
        rate = {"drop_path_rate": self.drop_path}  # always given, since some models default to 10 %
        try:
            return timm.create_model(self.name, num_classes=0, **size, **rate)
        except TypeError as error:  # a model without stochastic depth
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
            # At its own size where `load` can resize the positions and report it. Only timm can resize relative tables.
            size = {} if timm_position_grids(model) else size
            try:
                return timm.create_model(self.name, pretrained=True, num_classes=0, **size).state_dict()
            except Exception as error:  # the type of a failed download's error depends on the hub client
                reason = " ".join(str(error).split())
                raise UserError(
                    f"cannot fetch timm's weights of {self.name} ({reason}); set weights to a file"
                ) from error
        if is_run(self.weights):
            return read_run(self.weights, "image.model")
        state = reading.read_weights(self.weights)
        if "_conv_stem.weight" in state:
            return reading.from_efficientnet_pytorch(state, [len(stage) for stage in model.blocks])
        return state


def timm_attribute(model: nn.Module | None, name: str, default: Any = None) -> Any:
    """Return an attribute of a timm model or of one of its parts, ``default`` where the architecture has none."""
    return getattr(model, name, default)  # timm's architectures share names but no base class


def drop_head_conv(model: nn.Module) -> tuple[str, ...]:
    """Remove the 1x1 convolution in front of a timm model's classifier and return the names of the removed modules.

    EfficientNet has it before the pooling (``conv_head``, ``bn2``), MobileNetV3 after it (``conv_head``, ``norm_head``,
    ``act2``). Any other model is left unchanged.
    """
    if not isinstance(timm_attribute(model, "conv_head"), nn.Conv2d):
        return ()
    after_pooling = timm_attribute(model, "norm_head") is not None
    names = ("conv_head", "norm_head", "act2") if after_pooling else ("conv_head", "bn2")
    if not after_pooling:
        model.num_features = model.conv_head.in_channels
    model.head_hidden_size = model.num_features
    for name in names:
        setattr(model, name, nn.Identity())
    return names


def timm_position_grids(model: nn.Module) -> dict[str, Grid]:
    """Return the position embeddings of a timm model that lie on a patch grid, by parameter name."""
    grid = timm_attribute(timm_attribute(model, "patch_embed"), "grid_size")
    if grid is None or timm_attribute(model, "pos_embed") is None:
        return {}
    prefix = 0 if timm_attribute(model, "no_embed_class", False) else timm_attribute(model, "num_prefix_tokens", 0)
    return {"pos_embed": Grid(tuple(grid), prefix)}


def timm_layer_ids(model: nn.Module) -> dict[str, int]:
    """Return each parameter's depth as timm groups them: stem 0, blocks 1 to L, final norm L, pooling head L + 1."""
    group_matcher = timm_attribute(model, "group_matcher")
    if group_matcher is None:
        raise UserError(f"timm does not say which layers {type(model).__name__} has; set layer_decay to 1")
    return group_parameters(model, group_matcher(coarse=False), reverse=True)


def timm_no_weight_decay(model: nn.Module) -> set[str]:
    """Return the parameters that timm excludes from weight decay, and all tables of relative positions."""
    patterns = [*timm_attribute(model, "no_weight_decay", set)(), *RELATIVE_POSITIONS]
    return {name for name, _ in model.named_parameters() if any(fnmatch.fnmatch(name, p) for p in patterns)}


class TimmTower(ImageTower):
    """A timm model as a sequence of tokens.

    Token 0 is the model's own pooled output: the class token (in a distilled DeiT the mean of class and distillation
    token), the mean of the grid, or attention pooling (SigLIP). The others are the grid of the last layer, row by row.
    Class, distillation and register tokens take part inside the model but are not in the grid.

    Args:
        model: A timm model without classifier.
        preprocess: The input format of ``model``.
        report: Account of the loaded weights, None if they are random.
    """

    grid: tuple[int, int]

    def __init__(self, model: nn.Module, preprocess: Preprocess, report: LoadReport | None = None):
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.report = report
        self.width: int = model.num_features
        stride = model.feature_info[-1]["reduction"]
        self.grid = tuple(-(-side // stride) for side in preprocess.size)
        self.grid_has_positions = timm_attribute(self.model, "patch_embed") is not None  # False for a CNN
        # a ViT: every patch stays one token from its embedding to the last layer
        is_vit = timm_attribute(timm_attribute(model, "patch_embed"), "grid_size") is not None
        self.can_mask_patches = is_vit and timm_attribute(model, "num_prefix_tokens") is not None

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 1 + P, D) tokens of (B, 3, H, W) normalised images."""
        features = self.model.forward_features(image)
        pooled = self.model.forward_head(features, pre_logits=True)  # (B, D)
        if features.ndim == 3:
            grid = features[:, timm_attribute(self.model, "num_prefix_tokens", 0) :]  # (B, P, D)
        elif timm_attribute(self.model, "output_fmt", "NCHW") == "NHWC":
            grid = features.flatten(1, 2)  # (B, h, w, D) -> (B, P, D)
        else:
            grid = features.flatten(2).mT  # (B, D, h, w) -> (B, P, D)
        return torch.cat([pooled[:, None], grid], dim=1)

    def forward_masked(self, image: Tensor, masked: Tensor, mask_token: Tensor) -> Tensor:
        """Return a ViT's (B, P, D) final patch states, with the embeddings of masked patches replaced.

        The last norm is applied, also that of a model which pools before it (``fc_norm``). ``train.compile`` has no
        effect here: a compiled tower would keep the mask of the first step.

        Args:
            image: (B, 3, H, W) normalised.
            masked: (B, P) bool.
            mask_token: (D,).
        """

        def replace_patches(module: nn.Module, inputs: tuple[Tensor], patches: Tensor) -> Tensor:
            # (B, P, D), or (B, h, w, D) where the model takes any image size. Positions are added later.
            return torch.where(masked.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)

        with self.model.patch_embed.register_forward_hook(replace_patches):
            states = self.forward(image)[:, 1:]
        return self.model.fc_norm(states) if isinstance(self.model.norm, nn.Identity) else states

    def position_grids(self) -> dict[str, Grid]:
        """Return the position embeddings that lie on the patch grid."""
        return {f"model.{name}": grid for name, grid in timm_position_grids(self.model).items()}

    def layer_ids(self) -> dict[str, int]:
        """Return each parameter's depth, see `timm_layer_ids`."""
        return {f"model.{name}": depth for name, depth in timm_layer_ids(self.model).items()}

    def no_weight_decay(self) -> set[str]:
        """Return the names of class tokens, position embeddings and tables of relative positions."""
        return {f"model.{name}" for name in timm_no_weight_decay(self.model)}

    def set_activation_checkpointing(self, mode: Checkpointing) -> None:
        """Switch activation checkpointing. "cheap" needs a model with patches and blocks.

        Gradients do not change, but with "full" a BatchNorm counts each batch twice in its running statistics.

        Raises:
            UserError: if the model does not support ``mode``.
        """
        if timm_attribute(self.model, "patch_embed") is not None and timm_attribute(self.model, "blocks") is not None:
            return checkpoint_blocks(self.model.blocks, mode)
        if mode == "cheap":
            raise UserError(f"{type(self.model).__name__} has no blocks of matrix products; set it to full, or none")
        try:
            return self.model.set_grad_checkpointing(mode == "full")
        except (AssertionError, AttributeError) as error:
            raise UserError(f"{type(self.model).__name__} cannot checkpoint activations; turn that off") from error
