"""Networks of transformers that listen, speak or forecast, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from .zoo_images import Made, of

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
    return of("Wav2Vec2ConformerForCTC", config, {"input_values": torch.randn(2, 1600)})


def _hubert() -> Made:
    config = transformers.HubertConfig(**_SPEECH, conv_pos_batch_norm=True)
    return of("HubertModel", config, {"input_values": torch.randn(2, 1600)})


def _parakeet() -> Made:
    config = transformers.ParakeetEncoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        conv_kernel_size=9, subsampling_conv_channels=16, num_mel_bins=80,
    )  # fmt: skip
    return of("ParakeetEncoder", config, {"input_features": torch.randn(2, 64, 80)})


def _lasr() -> Made:
    config = transformers.LasrEncoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        subsampling_conv_channels=16, num_mel_bins=80,
    )  # fmt: skip
    return of("LasrEncoder", config, {"input_features": torch.randn(2, 64, 80)})


class _Seamless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.models.seamless_m4t import modeling_seamless_m4t as seamless

        config = transformers.SeamlessM4TConfig(
            hidden_size=32, speech_encoder_layers=2, speech_encoder_attention_heads=2,
            speech_encoder_intermediate_size=64, feature_projection_input_dim=16,
            num_conv_pos_embeddings=16, max_source_positions=64, adaptor_kernel_size=4,
            adaptor_stride=4, conv_depthwise_kernel_size=7,
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
    return of(
        "FastSpeech2ConformerModel", config, {"input_ids": torch.randint(1, 20, (1, 8)), "return_dict": True}
    )


def _clap() -> Made:
    config = transformers.ClapAudioConfig(
        window_size=4, num_mel_bins=16, spec_size=64, patch_size=4, patch_stride=[4, 4], hidden_size=32,
        depths=[1, 1], num_attention_heads=[2, 2], num_hidden_layers=2, patch_embeds_hidden_size=16,
        projection_dim=16, num_classes=5, enable_fusion=False,
    )  # fmt: skip
    return of("ClapAudioModel", config, {"input_features": torch.randn(1, 1, 100, 16)})


def _patchtst(norm_type: str = "batchnorm") -> Made:
    config = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=16, ffn_dim=32,
        num_attention_heads=2, num_hidden_layers=2, prediction_length=4, norm_type=norm_type,
    )  # fmt: skip
    return of("PatchTSTForPrediction", config, {"past_values": torch.randn(2, 32, 2)})


def _patchtsmixer() -> Made:
    config = transformers.PatchTSMixerConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=16,
        norm_mlp="BatchNorm", num_layers=2, prediction_length=4,
    )  # fmt: skip
    return of("PatchTSMixerForPrediction", config, {"past_values": torch.randn(2, 32, 2)})


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
    return of("InformerModel", config, example)


def _groupvit_projection() -> Made:
    from transformers.models.groupvit import modeling_groupvit as groupvit

    config = transformers.GroupViTConfig(projection_dim=16, projection_intermediate_dim=32)
    model = groupvit.GroupViTModel(config)
    return model.visual_projection, torch.randn(4, config.vision_config.hidden_size)


SEQUENCES: dict[str, Callable[[], Made]] = {
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
}
