"""Models from outside that read their first weights from a file beside them, where there is one."""

from pathlib import Path

import torch
from timm.models import create_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

SIZES = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "num_heads": 2}


def timm_vit(classes: int, depth: int = 2, weights: str = "") -> nn.Module:
    """Return timm's vision transformer, tiny."""
    vit = create_model("vit_tiny_patch16_224", num_classes=classes, depth=depth, **SIZES)
    if weights and Path(weights).exists():
        vit.load_state_dict(torch.load(weights, weights_only=True))
    return vit


def gpt2(input_shape: tuple[int, ...], classes: int, width: int = 8) -> nn.Module:
    """Return transformers' GPT-2, tiny: its last layer is the embedding again."""
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (context,) = input_shape
    config = GPT2Config(
        vocab_size=classes,
        n_positions=context,
        n_embd=width,
        n_layer=1,
        n_head=2,
        **none,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)
