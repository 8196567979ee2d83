"""A model from outside: Hugging Face's Wav2Vec2ForCTC, tiny, with random weights."""

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC


class Wav2Vec2(nn.Module):
    """Waveforms to log-probabilities of the data set's characters."""

    def __init__(self, classes: int, width: int = 16, depth: int = 1) -> None:
        super().__init__()
        config = Wav2Vec2Config(
            vocab_size=classes,
            conv_dim=[width] * 3,
            conv_kernel=[10, 8, 4],
            conv_stride=[5, 8, 4],
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=2 * width,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",  # the other one lets padding into the features
            mask_time_length=2,
        )
        self.whole = Wav2Vec2ForCTC(config)

    def tokens(self, lengths: Tensor) -> Tensor:
        """Return how many tokens so many samples make."""
        config = self.whole.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            lengths = (lengths - kernel) // stride + 1
        return lengths

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waveforms `[n, samples]` to log-probabilities and the number of tokens."""
        real = torch.arange(waves.shape[1], device=waves.device) < lengths.to(waves.device)[:, None]
        scores = self.whole(waves, attention_mask=real).logits
        return scores.log_softmax(-1), self.tokens(lengths)
