"""A model from outside: Hugging Face's GPT-2, small, with random weights that are tied."""

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


def gpt2(input_shape: tuple[int, ...], classes: int, width: int = 8, depth: int = 1) -> nn.Module:
    """Return the model for blocks of `input_shape` tokens."""
    config = GPT2Config(
        vocab_size=classes,
        n_positions=input_shape[0],
        n_embd=width,
        n_layer=depth,
        n_head=2,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)
