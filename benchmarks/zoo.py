"""Networks with batch normalization: transformers' from small configurations, plain torch's, and nasty ones.

Weights are random, and norms are away from their initial state, so that nothing is right by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from . import networks, zoo_nasty

Made = tuple[nn.Module, Any]


def made(name: str) -> Made:
    """Return a network of the zoo, in evaluation, and an example of what it takes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = ZOO[name]()
        for module in model.modules():
            _randomise(module)
    return model.eval(), example


def _randomise(module: nn.Module) -> None:
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        return
    with torch.no_grad():
        mean.normal_(0, 0.2)
        var.uniform_(0.5, 1.5)
        if getattr(module, "weight", None) is not None:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)


def _of(name: str, config: Any, example: Any) -> Made:
    model: nn.Module = getattr(transformers, name)(config)
    return model, example


def _images(name: str, side: int = 64, batch: int = 1, **settings: Any) -> Callable[[], Made]:
    """Return a maker of a network of images, `name` and its configuration's settings."""

    def make() -> Made:
        model_class = getattr(transformers, name)
        config = model_class.config_class(**settings)
        return _of(name, config, {"pixel_values": torch.randn(batch, 3, side, side)})

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
        return _of(name, config, {"pixel_values": torch.randn(1, 3, 64, 64)})

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
        return _of(name, config, {"pixel_values": torch.randn(1, 3, 128, 128)})

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
    return _of("DFineForObjectDetection", config, {"pixel_values": torch.randn(1, 3, 128, 128)})


def _hgnet_v2() -> Made:
    example = {"pixel_values": torch.randn(1, 3, 64, 64)}
    return _of("HGNetV2ForImageClassification", _hgnet(num_labels=5), example)


def _vitmatte() -> Made:
    backbone = transformers.VitDetConfig(
        num_channels=4, image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, out_features=["stage2"],
    )  # fmt: skip
    config = transformers.VitMatteConfig(
        backbone_config=backbone, hidden_size=32, fusion_hidden_sizes=[32, 16, 8, 4],
        convstream_hidden_sizes=[8, 16, 24],
    )  # fmt: skip
    return _of("VitMatteForImageMatting", config, {"pixel_values": torch.randn(1, 4, 64, 64)})


def _dpt() -> Made:
    config = transformers.DPTConfig(
        image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=64, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16, use_batch_norm_in_fusion_residual=True, num_labels=5, is_hybrid=False,
    )  # fmt: skip
    return _of("DPTForSemanticSegmentation", config, {"pixel_values": torch.randn(1, 3, 64, 64)})


_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
}


def _wav2vec2_conformer() -> Made:
    config = transformers.Wav2Vec2ConformerConfig(**_SPEECH, conv_depthwise_kernel_size=7)
    return _of("Wav2Vec2ConformerForCTC", config, {"input_values": torch.randn(2, 1600)})


def _hubert() -> Made:
    config = transformers.HubertConfig(**_SPEECH, conv_pos_batch_norm=True)
    return _of("HubertModel", config, {"input_values": torch.randn(2, 1600)})


def _parakeet() -> Made:
    config = transformers.ParakeetEncoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        conv_kernel_size=9, subsampling_conv_channels=16, num_mel_bins=80,
    )  # fmt: skip
    return _of("ParakeetEncoder", config, {"input_features": torch.randn(2, 64, 80)})


def _lasr() -> Made:
    config = transformers.LasrEncoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        subsampling_conv_channels=16, num_mel_bins=80,
    )  # fmt: skip
    return _of("LasrEncoder", config, {"input_features": torch.randn(2, 64, 80)})


class _Seamless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.models.seamless_m4t import modeling_seamless_m4t as seamless

        config = transformers.SeamlessM4TConfig(
            hidden_size=32, speech_encoder_layers=2, speech_encoder_attention_heads=2,
            speech_encoder_intermediate_size=64, feature_projection_input_dim=16, conv_depthwise_kernel_size=7,
            num_conv_pos_embeddings=16, max_source_positions=64, adaptor_kernel_size=4, adaptor_stride=4,
        )  # fmt: skip
        self.encoder = seamless.SeamlessM4TSpeechEncoder(config)

    def forward(self, features: torch.Tensor) -> Any:
        return self.encoder(features).last_hidden_state


def _speecht5_postnet() -> Made:
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5SpeechDecoderPostnet

    config = transformers.SpeechT5Config(
        num_mel_bins=16, reduction_factor=2, speech_decoder_postnet_units=32, hidden_size=32
    )
    return SpeechT5SpeechDecoderPostnet(config), torch.randn(2, 10, 32)


def _fastspeech2() -> Made:
    config = transformers.FastSpeech2ConformerConfig(
        hidden_size=32, vocab_size=20, num_mel_bins=16, encoder_num_attention_heads=2, encoder_layers=1,
        encoder_linear_units=32, decoder_layers=1, decoder_num_attention_heads=2, decoder_linear_units=32,
        speech_decoder_postnet_units=32, speech_decoder_postnet_layers=3, pitch_predictor_layers=1,
        energy_predictor_layers=1, duration_predictor_layers=1, positionwise_conv_kernel_size=3,
        encoder_normalize_before=False, decoder_normalize_before=False, duration_predictor_channels=32,
        energy_predictor_channels=32, pitch_predictor_channels=32,
    )  # fmt: skip
    return _of(
        "FastSpeech2ConformerModel", config, {"input_ids": torch.randint(1, 20, (1, 8)), "return_dict": True}
    )


def _clap() -> Made:
    config = transformers.ClapAudioConfig(
        window_size=4, num_mel_bins=16, spec_size=64, patch_size=4, patch_stride=[4, 4], hidden_size=32,
        depths=[1, 1], num_attention_heads=[2, 2], num_hidden_layers=2, patch_embeds_hidden_size=16,
        projection_dim=16, num_classes=5, enable_fusion=False,
    )  # fmt: skip
    return _of("ClapAudioModel", config, {"input_features": torch.randn(1, 1, 100, 16)})


def _patchtst(norm_type: str = "batchnorm") -> Made:
    config = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=16, ffn_dim=32,
        num_attention_heads=2, num_hidden_layers=2, prediction_length=4, norm_type=norm_type,
    )  # fmt: skip
    return _of("PatchTSTForPrediction", config, {"past_values": torch.randn(2, 32, 2)})


def _patchtsmixer() -> Made:
    config = transformers.PatchTSMixerConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=16,
        norm_mlp="BatchNorm", num_layers=2, prediction_length=4,
    )  # fmt: skip
    return _of("PatchTSMixerForPrediction", config, {"past_values": torch.randn(2, 32, 2)})


def _informer() -> Made:
    config = transformers.InformerConfig(
        prediction_length=4, context_length=12, lags_sequence=[1, 2], d_model=16, encoder_layers=3,
        num_time_features=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    length = 12 + 2
    example = {
        "past_values": torch.randn(2, length), "past_time_features": torch.randn(2, length, 1),
        "past_observed_mask": torch.ones(2, length), "future_values": torch.randn(2, 4),
        "future_time_features": torch.randn(2, 4, 1),
    }  # fmt: skip
    return _of("InformerModel", config, example)


def _groupvit_projection() -> Made:
    from transformers.models.groupvit import modeling_groupvit as groupvit

    config = transformers.GroupViTConfig(projection_dim=16, projection_intermediate_dim=32)
    model = groupvit.GroupViTModel(config)
    return model.visual_projection, torch.randn(4, config.vision_config.hidden_size)


def _upernet() -> Made:
    config = transformers.UperNetConfig(
        backbone_config=_resnet_backbone(out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_size=16, auxiliary_in_channels=64, auxiliary_channels=16, num_labels=5,
    )  # fmt: skip
    return _of("UperNetForSemanticSegmentation", config, {"pixel_values": torch.randn(1, 3, 64, 64)})


def _stock(name: str) -> Callable[[], Made]:
    return lambda: (networks.NETWORKS[name](networks.stock), torch.randn(1, 3, 64, 64))


ZOO: dict[str, Callable[[], Made]] = {
    **{name: _stock(name) for name in networks.NETWORKS},
    "transformers ResNet-50": _images("ResNetForImageClassification", embedding_size=16, hidden_sizes=[32, 64, 128, 256], num_labels=5),
    "transformers ResNet-18": _images("ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], layer_type="basic", num_labels=5),
    "RegNetY": _images("RegNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 2, 1], groups_width=8, num_labels=5),
    "RegNetX": _images("RegNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 2, 1], groups_width=8, layer_type="x", num_labels=5),
    "MobileNetV1": _images("MobileNetV1ForImageClassification", image_size=64, depth_multiplier=0.25, num_labels=5),
    "MobileNetV2 (transformers)": _images("MobileNetV2ForImageClassification", image_size=64, depth_multiplier=0.25, num_labels=5),
    "MobileNetV2, segmentation": _images("MobileNetV2ForSemanticSegmentation", batch=2, image_size=64, depth_multiplier=0.25, num_labels=5),
    "EfficientNet": _images("EfficientNetForImageClassification", **_EFFICIENT),
    "ALIGN, vision": _images("AlignVisionModel", **_EFFICIENT),
    "LeViT": _images("LevitForImageClassification", image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[2, 2, 2], num_labels=5),
    "CvT": _images("CvtForImageClassification", embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3], num_labels=5),
    "MobileViT": _images("MobileViTForImageClassification", **_MOBILEVIT, num_labels=5),
    "MobileViT, segmentation": _images("MobileViTForSemanticSegmentation", batch=2, **_MOBILEVIT, aspp_out_channels=32, num_labels=5),
    "MobileViTV2": _images("MobileViTV2ForImageClassification", image_size=64, width_multiplier=0.5, n_attn_blocks=[1, 1, 1], num_labels=5),
    "SwiftFormer": _images("SwiftFormerForImageClassification", image_size=64, depths=[1, 1, 2, 1], embed_dims=[16, 24, 32, 48], num_labels=5),
    "HGNet-V2": _hgnet_v2,
    "PP-LCNet": _images("PPLCNetForImageClassification", scale=0.5, class_expand=64, num_labels=5),
    "TextNet": _images("TextNetForImageClassification", image_size=64, stem_out_channels=16, hidden_sizes=[16, 16, 32, 32, 48], num_labels=5),
    "BEiT, segmentation": _images("BeitForSemanticSegmentation", batch=2, **_BEIT),
    "Data2Vec, segmentation": _images("Data2VecVisionForSemanticSegmentation", batch=2, **_BEIT),
    "SegFormer": _images("SegformerForSemanticSegmentation", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], decoder_hidden_size=16, num_labels=5),
    "GLPN": _images("GLPNForDepthEstimation", hidden_sizes=[8, 16, 40, 64], depths=[1, 1, 1, 1], decoder_hidden_size=16),
    "DPT": _dpt,
    "UperNet on ResNet": _upernet,
    "ViTMatte": _vitmatte,
    "DETR": _detr("DetrForObjectDetection"),
    "Conditional DETR": _detr("ConditionalDetrForObjectDetection"),
    "RT-DETR": _rt_detr("RTDetrForObjectDetection", freeze=False),
    "RT-DETR, frozen backbone": _rt_detr("RTDetrForObjectDetection", freeze=True),
    "RT-DETRv2": _rt_detr("RTDetrV2ForObjectDetection", freeze=True),
    "D-FINE": _d_fine,
    "wav2vec2-Conformer": _wav2vec2_conformer,
    "HuBERT": _hubert,
    "Parakeet": _parakeet,
    "LASR": _lasr,
    "SeamlessM4T, speech": lambda: (_Seamless(), torch.randn(2, 32, 16)),
    "SpeechT5, postnet": _speecht5_postnet,
    "FastSpeech2-Conformer": _fastspeech2,
    "CLAP, audio": _clap,
    "PatchTST": _patchtst,
    "PatchTSMixer": _patchtsmixer,
    "Informer": _informer,
    "GroupViT, projection": _groupvit_projection,
    **zoo_nasty.NASTY,
}  # fmt: skip
