"""Networks of transformers that look at images, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

Made = tuple[nn.Module, Any]


def of(name: str, config: Any, example: Any) -> Made:
    """Return a network of transformers by its name, and an example of what it takes."""
    model: nn.Module = getattr(transformers, name)(config)
    return model, example


def _images(name: str, side: int = 64, batch: int = 1, **settings: Any) -> Callable[[], Made]:
    """Return a maker of a network of images, `name` and its configuration's settings."""

    def make() -> Made:
        model_class = getattr(transformers, name)
        config = model_class.config_class(**settings)
        return of(name, config, {"pixel_values": torch.randn(batch, 3, side, side)})

    return make


_EFFICIENT = {
    "width_coefficient": 0.5,
    "depth_coefficient": 1.0,
    "image_size": 64,
    "hidden_dim": 640,
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
}
_MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
}
_BEIT = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "out_indices": [1, 2, 3, 4],
    "num_labels": 5,
}
_DETECTOR = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [64, 128, 256],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 2,
    "num_queries": 20,
    "num_denoising": 0,
    "num_labels": 5,
}


def _resnet_backbone(**settings: Any) -> Any:
    return transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], num_labels=5, **settings
    )


def _on_backbone(name: str, out_features: list[str], **settings: Any) -> Callable[[], Made]:
    """Return a maker of a network on a small ResNet."""

    def make() -> Made:
        model_class = getattr(transformers, name)
        backbone = _resnet_backbone(out_features=out_features)
        config = model_class.config_class(backbone_config=backbone, **settings)
        return of(name, config, {"pixel_values": torch.randn(1, 3, 64, 64)})

    return make


def _detr(name: str) -> Callable[[], Made]:
    return _on_backbone(
        name,
        ["stage4"],
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_labels=5,
    )


def _rt_detr(name: str, freeze: bool) -> Callable[[], Made]:
    def make() -> Made:
        model_class = getattr(transformers, name)
        backbone = transformers.RTDetrResNetConfig(
            embedding_size=16,
            hidden_sizes=[32, 64, 128, 256],
            depths=[1, 1, 1, 1],
            out_features=["stage2", "stage3", "stage4"],
        )
        config = model_class.config_class(
            backbone_config=backbone, freeze_backbone_batch_norms=freeze, **_DETECTOR
        )
        return of(name, config, {"pixel_values": torch.randn(1, 3, 128, 128)})

    return make


def _hgnet(**settings: Any) -> Any:
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 16],
        stage_in_channels=[16, 32, 64, 128],
        stage_mid_channels=[8, 16, 24, 32],
        stage_out_channels=[32, 64, 128, 256],
        hidden_sizes=[32, 64, 128, 256],
        stage_numb_of_layers=[2, 2, 2, 2],
        stage_num_blocks=[1, 1, 1, 1],
        depths=[1, 1, 1, 1],
        embedding_size=16,
        **settings,
    )


def _d_fine() -> Made:
    backbone = _hgnet(out_features=["stage2", "stage3", "stage4"], use_learnable_affine_block=True)
    config = transformers.DFineConfig(
        backbone_config=backbone, freeze_backbone_batch_norms=False, **_DETECTOR
    )
    return of("DFineForObjectDetection", config, {"pixel_values": torch.randn(1, 3, 128, 128)})


def _hgnet_v2() -> Made:
    example = {"pixel_values": torch.randn(1, 3, 64, 64)}
    return of("HGNetV2ForImageClassification", _hgnet(num_labels=5), example)


def _vitmatte() -> Made:
    backbone = transformers.VitDetConfig(
        num_channels=4, image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, out_features=["stage2"],
    )  # fmt: skip
    config = transformers.VitMatteConfig(
        backbone_config=backbone, hidden_size=32, fusion_hidden_sizes=[32, 16, 8, 4],
        convstream_hidden_sizes=[8, 16, 24],
    )  # fmt: skip
    return of("VitMatteForImageMatting", config, {"pixel_values": torch.randn(1, 4, 64, 64)})


def _dpt() -> Made:
    config = transformers.DPTConfig(
        image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=64, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16, use_batch_norm_in_fusion_residual=True, num_labels=5, is_hybrid=False,
    )  # fmt: skip
    return of("DPTForSemanticSegmentation", config, {"pixel_values": torch.randn(1, 3, 64, 64)})


def _upernet() -> Made:
    config = transformers.UperNetConfig(
        backbone_config=_resnet_backbone(out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_size=16, auxiliary_in_channels=64, auxiliary_channels=16, num_labels=5,
    )  # fmt: skip
    return of("UperNetForSemanticSegmentation", config, {"pixel_values": torch.randn(1, 3, 64, 64)})


IMAGES: dict[str, Callable[[], Made]] = {
    "transformers ResNet-50": _images(
        "ResNetForImageClassification", embedding_size=16, hidden_sizes=[32, 64, 128, 256], num_labels=5
    ),
    "transformers ResNet-18": _images(
        "ResNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=5,
    ),
    "RegNetY": _images(
        "RegNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 2, 2, 1],
        groups_width=8,
        num_labels=5,
    ),
    "RegNetX": _images(
        "RegNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 2, 2, 1],
        groups_width=8,
        layer_type="x",
        num_labels=5,
    ),
    "MobileNetV1": _images(
        "MobileNetV1ForImageClassification", image_size=64, depth_multiplier=0.25, num_labels=5
    ),
    "MobileNetV2 (transformers)": _images(
        "MobileNetV2ForImageClassification", image_size=64, depth_multiplier=0.25, num_labels=5
    ),
    "MobileNetV2, segmentation": _images(
        "MobileNetV2ForSemanticSegmentation", batch=2, image_size=64, depth_multiplier=0.25, num_labels=5
    ),
    "EfficientNet": _images("EfficientNetForImageClassification", **_EFFICIENT),
    "ALIGN, vision": _images("AlignVisionModel", **_EFFICIENT),
    "LeViT": _images(
        "LevitForImageClassification",
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
        num_labels=5,
    ),
    "CvT": _images(
        "CvtForImageClassification",
        embed_dim=[16, 32, 48],
        num_heads=[1, 2, 3],
        depth=[1, 2, 3],
        num_labels=5,
    ),
    "MobileViT": _images("MobileViTForImageClassification", **_MOBILEVIT, num_labels=5),
    "MobileViT, segmentation": _images(
        "MobileViTForSemanticSegmentation", batch=2, **_MOBILEVIT, aspp_out_channels=32, num_labels=5
    ),
    "MobileViTV2": _images(
        "MobileViTV2ForImageClassification",
        image_size=64,
        width_multiplier=0.5,
        n_attn_blocks=[1, 1, 1],
        num_labels=5,
    ),
    "SwiftFormer": _images(
        "SwiftFormerForImageClassification",
        image_size=64,
        depths=[1, 1, 2, 1],
        embed_dims=[16, 24, 32, 48],
        num_labels=5,
    ),
    "HGNet-V2": _hgnet_v2,
    "PP-LCNet": _images("PPLCNetForImageClassification", scale=0.5, class_expand=64, num_labels=5),
    "TextNet": _images(
        "TextNetForImageClassification",
        image_size=64,
        stem_out_channels=16,
        hidden_sizes=[16, 16, 32, 32, 48],
        num_labels=5,
    ),
    "BEiT, segmentation": _images("BeitForSemanticSegmentation", batch=2, **_BEIT),
    "Data2Vec, segmentation": _images("Data2VecVisionForSemanticSegmentation", batch=2, **_BEIT),
    "SegFormer": _images(
        "SegformerForSemanticSegmentation",
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=16,
        num_labels=5,
    ),
    "GLPN": _images(
        "GLPNForDepthEstimation", hidden_sizes=[8, 16, 40, 64], depths=[1, 1, 1, 1], decoder_hidden_size=16
    ),
    "DPT": _dpt,
    "UperNet on ResNet": _upernet,
    "ViTMatte": _vitmatte,
    "DETR": _detr("DetrForObjectDetection"),
    "Conditional DETR": _detr("ConditionalDetrForObjectDetection"),
    "RT-DETR": _rt_detr("RTDetrForObjectDetection", freeze=False),
    "RT-DETR, frozen backbone": _rt_detr("RTDetrForObjectDetection", freeze=True),
    "RT-DETRv2": _rt_detr("RTDetrV2ForObjectDetection", freeze=True),
    "D-FINE": _d_fine,
}
