"""Layers by name: which ones lie in the blocks, and a copy with others in their places."""

import torch
from torch import nn

from effnlp_lessons.layers import block_linears, block_of_name, with_layers
from effnlp_lessons.transformer import Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=20, max_length=8, d_model=8, layers=2, heads=2, d_ff=12)


def test_the_block_of_a_name():
    assert block_of_name("encoder.blocks.3.channel_mixer.expand") == 3
    assert block_of_name("blocks.12.token_mixer.query") == 12
    assert block_of_name("encoder.pooler") is None
    assert block_of_name("myblocks.3.query") is None


def test_block_linears_are_six_a_block():
    names = block_linears(Encoder(CONFIG))
    assert len(names) == 12 and {block_of_name(name) for name in names} == {0, 1}


def test_with_layers_changes_a_copy_and_keeps_modes():
    model = Encoder(CONFIG).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = nn.Linear(8, 8)
    copied = with_layers(model, {"blocks.1.token_mixer.query": new})
    assert copied.blocks[1].token_mixer.query is new and not new.training
    assert model.blocks[1].token_mixer.query is not new
    assert copied.blocks[0].token_mixer.query.weight is not model.blocks[0].token_mixer.query.weight
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
