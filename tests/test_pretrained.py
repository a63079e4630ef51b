"""The published weights and the stored difference: names, exchange of parts, bad files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pretrained import apply_difference_, load_minilm
from effnlp_lessons.transformer import Encoder, TransformerConfig

SMALL = TransformerConfig(vocab_size=40, max_length=16, d_model=16, layers=2, heads=2, d_ff=24)


def test_bad_difference_files_are_named(tmp_path):
    model = SentenceClassifier(Encoder(SMALL), 2)
    with pytest.raises(FileNotFoundError, match="record it with `python -m effnlp_lessons.studies teacher`"):
        apply_difference_(model, tmp_path / "none.safetensors")
    save_file({"blocks.7.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="changes 'blocks.7.weight', which the model does not have"):
        apply_difference_(model, tmp_path / "other.safetensors")


def test_minilm_keeps_its_weights_when_the_channel_mixer_is_exchanged():
    encoder = load_minilm(channel_mixer=lambda config, layer: nn.Identity())
    assert torch.equal(encoder.blocks[3].token_mixer.query.weight, load_minilm().blocks[3].token_mixer.query.weight)
