"""Models of other libraries, and ours, as small as they can be."""

from torch import nn
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from fedpriv.models import ViTOptions, build_model
from fedpriv.models.gpt import GPTOptions

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def bert() -> nn.Module:
    config = RobertaConfig(vocab_size=9, max_position_embeddings=16, num_labels=3, **TINY)
    return RobertaForSequenceClassification(config)


def wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (4,), "conv_stride": (5,), "conv_kernel": (10,)}
    groups = {"num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=5, **convolutions, **groups, **TINY))


def hf_vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **TINY))


def ours() -> nn.Module:
    return build_model(ViTOptions(dim=8, depth=1, heads=2), (1, 8, 8), classes=3, seed=1)


def our_gpt() -> nn.Module:
    return build_model(GPTOptions(dim=8, depth=1, heads=2), (6,), classes=5, seed=1)
