"""`make bench`: the course's encoder beside transformers' BertModel, same weights, same batch, in turns."""

import pytest
import torch
from transformers import BertModel

from effnlp_lessons.datasets import sources
from effnlp_lessons.measure import latencies, peak_memory
from effnlp_lessons.pretrained import load_minilm

SHAPES = {"32 sentences of 24 tokens": (32, 24), "1 text of 512 tokens": (1, 512)}


@pytest.mark.parametrize(("batch", "length"), SHAPES.values(), ids=SHAPES.keys())
def test_encoder_beside_transformers(batch, length):
    torch.set_num_threads(1)
    folder = sources.path("minilm", "model.safetensors").parent
    models = {"ours": load_minilm()}
    for name in ("eager", "sdpa"):
        models[f"transformers, {name}"] = BertModel.from_pretrained(folder, attn_implementation=name).eval()
    ids = torch.randint(1_000, 30_000, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, length, dtype=torch.bool)
    calls = {name: lambda model=model: model(ids, mask) for name, model in models.items()}
    times = latencies(calls, runs=15)
    print(f"\nMiniLM-L6 forward, {batch} x {length} tokens, float32, one thread, medians of 15 turns, ratio to ours")
    for name, call in calls.items():
        ratio = times[name].median / times["ours"].median
        print(f"  {name:20} {times[name]!s:>26}   {ratio:4.2f} x   peak memory {peak_memory(call) / 1e6:6.1f} MB")
    assert times["ours"].median < 1.25 * times["transformers, eager"].median
