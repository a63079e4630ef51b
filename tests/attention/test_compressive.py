"""Compressive Transformer: every compression, both queues, who learns from which loss, how far back a layer sees."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effnlp_lessons.attention.compressive import (
    COMPRESSIONS,
    RECONSTRUCTIONS,
    Compression,
    CompressiveAttention,
    max_pool,
    mean_pool,
    most_used,
)
from effnlp_lessons.attention.transformer_xl import TransformerXLAttention
from effnlp_lessons.transformer import Decoder, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=30, max_length=0, d_model=12, layers=2, heads=3, d_ff=16, segments=0, pooler=False, dropout=0.0
)
every_compression = pytest.mark.parametrize("compression", COMPRESSIONS)
every_reconstruction = pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fill_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random numbers in all parameters, u and v among them, in float64."""
    module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(0.4 * random(*parameter.shape, seed=1000 * seed + number))
    return module


def mixer(memory: int, compressed: int, rate: int, *kinds: str) -> CompressiveAttention:
    return fill_(CompressiveAttention(CONFIG, memory, compressed, rate, *kinds))


def run(module: torch.nn.Module, x: Tensor, cuts: list[int], mask: Tensor | None = None) -> tuple[Tensor, list]:
    """Outputs of the text cut into segments of these lengths, and the state after each."""
    outputs, states, end = [], [], 0
    for part in x.split(cuts, dim=1):
        end += part.shape[1]
        y, state = module(part, None if mask is None else mask[:, :end], states[-1] if states else None)
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs, dim=1), states


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------- the compression functions


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=25)
def test_pooling_is_torchs_and_skips_padded_rows(rate, slots, seed):
    old = random(2, rate * slots, 5, seed=seed)
    everything = torch.ones(2, rate * slots, dtype=torch.bool)
    close(mean_pool(old, everything, rate), F.avg_pool1d(old.mT, rate).mT)
    close(max_pool(old, everything, rate), F.max_pool1d(old.mT, rate).mT)
    real = random(2, rate * slots, seed=seed + 1) > 0
    for b in range(2):
        for slot in range(slots):
            window = slice(slot * rate, (slot + 1) * rate)
            kept = old[b, window][real[b, window]]
            mean, largest = (kept.mean(0), kept.amax(0)) if len(kept) else (torch.zeros(5).double(),) * 2
            close(mean_pool(old, real, rate)[b, slot], mean)
            close(max_pool(old, real, rate)[b, slot], largest)


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_convolution_is_torchs_with_kernel_and_stride_of_the_rate(rate):
    compression = fill_(Compression(5, rate, "convolution", decoder=True))
    old, real = random(2, 4 * rate, 5), torch.ones(2, 4 * rate, dtype=torch.bool)
    real[1, : rate + 1] = False
    new, new_real = compression(old, real, real.double())
    kernel = compression.convolution.weight.unflatten(1, (rate, 5)).transpose(1, 2)
    close(new, F.conv1d((old * real[..., None]).mT, kernel, compression.convolution.bias, stride=rate).mT)
    assert new_real.tolist() == [[True] * 4, [False] + [True] * 3 if rate > 1 else [False, False, True, True]]
    # g goes back: a transposed convolution
    kernel = compression.decoder.weight.unflatten(0, (rate, 5)).permute(2, 1, 0)
    bias = compression.decoder.bias.unflatten(0, (rate, 5))
    wanted = F.conv_transpose1d(new.mT, kernel, stride=rate).mT + bias.repeat(4, 1)
    close(compression.decode(new), wanted)


@pytest.mark.parametrize(("rate", "slots"), [(1, 1), (2, 1), (3, 4)])
def test_dilated_is_torchs_dilated_convolutions_with_residuals(rate, slots):
    compression = fill_(Compression(5, rate, "dilated", decoder=False))
    old, real = random(2, rate * slots, 5), torch.ones(2, rate * slots, dtype=torch.bool)
    new, _ = compression(old, real, real.double())
    rows = old.mT
    for layer, gap in zip(compression.dilated, (1, 2), strict=True):
        kernel = layer.weight.unflatten(1, (3, 5)).transpose(1, 2)
        rows = rows + F.relu(F.conv1d(rows, kernel, layer.bias, padding=gap, dilation=gap))
    kernel = compression.convolution.weight.unflatten(1, (rate, 5)).transpose(1, 2)
    close(new, F.conv1d(rows, kernel, compression.convolution.bias, stride=rate).mT)


def test_dilated_reads_nothing_from_padded_rows():
    compression, old = fill_(Compression(5, 2, "dilated", decoder=False)), random(1, 8, 5)
    real = torch.tensor([[True, False, True, True, False, False, True, True]])
    other = torch.where(real[..., None], old, old + 1)
    assert torch.equal(compression(old, real, real.double())[0], compression(other, real, real.double())[0])
    # padded rows stay zeros from layer to layer, as what lies outside
    real = (torch.arange(8) >= 2)[None]
    close(
        compression(old, real, real.double())[0][:, 1:], compression(old[:, 2:], real[:, 2:], real[:, 2:].double())[0]
    )


def test_most_used_keeps_the_rows_with_the_most_usage_in_their_order():
    old = torch.arange(8.0)[None, :, None].expand(2, 8, 3)
    usage = torch.tensor([[0.1, 0.9, 0.2, 0.0, 0.8, 0.3, 0.7, 0.6], [5.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0]])
    real = torch.ones(2, 8, dtype=torch.bool)
    new, new_real = most_used(old, real, usage, 2)
    assert new[..., 0].tolist() == [[1, 4, 6, 7], [0, 2, 3, 4]] and new_real.all()
    real[1, :5] = False
    real[0, 4] = False
    new, new_real = most_used(old, real, usage, 2)
    assert new[0, :, 0].tolist() == [1, 5, 6, 7]
    assert new_real.sum(1).tolist() == [4, 3] and set(new[1, new_real[1], 0].tolist()) == {5, 6, 7}


@pytest.mark.parametrize("cuts", [[5, 5, 5, 5], [1] * 20, [3, 9, 2, 6]])
def test_usage_is_the_mean_attention_per_query_since_the_row_was_written(cuts):
    module, x = mixer(6, 3, 2, "most-used"), random(2, 20, 12)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 4:7] = False
    received = torch.zeros(2, 20).double()
    state, seen, in_memory = None, 0, []
    for part in x.split(cuts, dim=1):
        past = torch.cat([state.compressed, state.memory], 1) if state else part[:, :0]
        past_real = torch.cat([state.compressed_real, state.memory_real], 1) if state else mask[:, :0]
        slots = state.compressed.shape[1] if state else 0
        new = list(range(seen, seen + part.shape[1]))
        real = torch.cat([past_real, mask[:, new]], 1)
        _, weights = module.mix(part, past, real, return_weights=True)
        in_memory += new
        received[:, in_memory] += weights.sum((1, 2))[:, slots:].detach()
        seen += part.shape[1]
        _, state = module(part, mask[:, new], state)
        due, in_memory = in_memory[: len(in_memory) - state.memory.shape[1]], in_memory[-state.memory.shape[1] :]
        close(state.usage, received[:, in_memory])
        if due:
            queries = torch.stack([mask[:, row:seen].sum(1) for row in due], 1)
            mean = (received[:, due] / queries.clamp(min=1)).masked_fill(~mask[:, due], -1)
            for b in range(2):
                kept = sorted(mean[b].argsort(descending=True)[: len(due) // 2].tolist())
                slots = min(3, len(kept))
                wanted = torch.stack([x[b, due[row]] for row in kept])
                ours_real = state.compressed_real[b, -slots:]
                assert torch.equal(state.compressed[b, -slots:][ours_real], wanted[-slots:][ours_real])


# ----------------------------------------------------------------------------- the two queues


def integer_text(length: int, first: int = 0) -> Tensor:
    """Token t is the number t in all channels."""
    return torch.arange(first, first + length, dtype=torch.float64)[None, :, None].expand(1, length, 12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 7), st.integers(0, 5), st.integers(1, 4))
@settings(max_examples=40)
def test_every_token_is_where_the_queues_say(cuts, memory, compressed, rate):
    # as max_pool keeps the last of rising numbers, a slot names the end of its window
    _, states = run(mixer(memory, compressed, rate, "max"), integer_text(sum(cuts)), cuts)
    seen = 0
    for length, state in zip(cuts, states, strict=True):
        seen += length
        windows = max(0, seen - memory) // rate
        slots = range(max(0, windows - compressed), windows)
        assert state.compressed[0, :, 0].tolist() == [rate * slot + rate - 1 for slot in slots]
        assert state.memory[0, :, 0].tolist() == list(range(windows * rate, seen))
        assert len(state.memory[0]) < memory + rate


def test_the_papers_case_of_full_queues():
    # segments of 6, memory of 6, rate 3: two slots per segment
    _, states = run(mixer(6, 3, 3, "mean"), integer_text(24), [6, 6, 6, 6])
    assert [s.memory[0, :, 0].tolist() for s in states] == [list(range(6 * i, 6 * i + 6)) for i in range(4)]
    assert [s.compressed[0, :, 0].tolist() for s in states] == [[], [1, 4], [4, 7, 10], [10, 13, 16]]


@pytest.mark.parametrize("compression", ["mean", "max", "convolution"])
@pytest.mark.parametrize("cuts", [[1] * 23, [7, 2, 14], [5, 5, 5, 5, 3]])
def test_the_slots_do_not_depend_on_the_cuts(compression, cuts):
    module, x = mixer(5, 4, 3, compression), random(2, 23, 12)
    (whole,), ours = run(module, x, [23])[1], run(module, x, cuts)[1][-1]
    close(ours.memory, whole.memory)
    close(ours.compressed, whole.compressed)


@every_compression
def test_before_anything_is_compressed_it_is_transformer_xl(compression):
    module, x = mixer(9, 4, 3, compression), random(2, 11, 12)
    plain = TransformerXLAttention(CONFIG, 11).double()
    plain.load_state_dict(module.state_dict(), strict=False)
    y, states = run(module, x, [4, 4, 3])
    close(y, run(plain, x, [4, 4, 3])[0])
    assert [state.reconstruction_loss.item() for state in states] == [0, 0, 0]
    assert states[-1].compressed.shape == (2, 0, 12) and states[-1].memory.shape == (2, 11, 12)


@pytest.mark.parametrize("compression", ["convolution", "mean", "max", "most-used"])
@pytest.mark.parametrize("cuts", [[5] * 5, [1] * 25, [12, 3, 10]])
def test_rate_1_and_the_identity_are_a_longer_transformer_xl_memory(compression, cuts):
    module, x = mixer(6, 4, 1, compression), random(2, 25, 12)
    if compression == "convolution":
        with torch.no_grad():
            module.compression.convolution.weight.copy_(torch.eye(12))
            module.compression.convolution.bias.zero_()
    plain = TransformerXLAttention(CONFIG, 10).double()
    plain.load_state_dict(module.state_dict(), strict=False)
    y, states = run(module, x, cuts)
    close(y, run(plain, x, cuts)[0])
    assert max(state.reconstruction_loss.item() for state in states) < 1e-20


def test_slots_have_the_distances_of_consecutive_text():
    module, x = mixer(4, 3, 2), random(2, 21, 12)
    _, states = run(module, x[:, :16], [8, 8])
    plain = TransformerXLAttention(CONFIG, 100).double()
    plain.load_state_dict(module.state_dict(), strict=False)
    past = torch.cat([states[-1].compressed, states[-1].memory], dim=1)
    assert past.shape[1] == 7
    close(module(x[:, 16:], None, states[-1])[0], plain(x[:, 16:], None, past)[0])


# ----------------------------------------------------------------------------- reach and causality


@pytest.mark.parametrize("compression", ["mean", "convolution", "max"])
@pytest.mark.parametrize(
    ("memory", "compressed", "rate", "segment"), [(4, 3, 2, 4), (6, 2, 3, 3), (3, 2, 3, 6), (2, 0, 2, 2)]
)
def test_one_layer_reaches_memory_plus_rate_times_slots(compression, memory, compressed, rate, segment):
    # whole windows are due after the last segment, so that no row waits, and both queues are full
    cuts = [memory % segment] * (memory % segment > 0) + [segment] * 8 + [1]
    length = sum(cuts) - 1
    assert (length - memory) % rate == 0 and length > memory + rate * compressed
    module, x = mixer(memory, compressed, rate, compression), random(1, length + 1, 12)
    before = run(module, x, cuts)[0][:, -1]
    reached = []
    for token in range(length):
        other = x.clone()
        other[:, token] += 10  # the largest of its window too
        if not torch.equal(run(module, other, cuts)[0][:, -1], before):
            reached.append(length - token)  # the distance to the last token
    assert reached == list(range(memory + rate * compressed, 0, -1))


@every_compression
def test_the_future_changes_no_bit_of_the_past(compression):
    model = fill_(Decoder(CONFIG, token_mixer=lambda config, layer: CompressiveAttention(config, 4, 3, 2, compression)))
    ids = torch.randint(30, (2, 24), generator=torch.Generator().manual_seed(0))

    def logits(ids: Tensor) -> Tensor:
        state, parts = None, []
        for part in ids.split([5, 5, 6, 8], dim=1):
            out = model(part, None, state)
            state = out.state
            parts.append(out.logits)
        return torch.cat(parts, dim=1)

    before = logits(ids)
    for first in (2, 10, 13, 23):
        after = logits(torch.cat([ids[:, :first], (ids[:, first:] + 1) % 30], dim=1))
        assert torch.equal(after[:, :first], before[:, :first])
        assert not torch.equal(after[:, first:], before[:, first:])


# ----------------------------------------------------------------------------- padding


@every_compression
@every_reconstruction
def test_padded_tokens_change_nothing(compression, reconstruction):
    module, x = mixer(4, 3, 2, compression, reconstruction), random(3, 22, 12)
    mask = torch.ones(3, 22, dtype=torch.bool)
    mask[0, :6] = mask[1, 7:12] = mask[1, 18:] = mask[2] = False
    y, states = run(module, x, [5, 6, 3, 8], mask)
    other, other_states = run(module, torch.where(mask[..., None], x, x + 3), [5, 6, 3, 8], mask)
    assert torch.isfinite(y).all() and y[~mask].eq(0).all() and y[mask].ne(0).all()
    assert torch.equal(y, other)
    for ours, theirs in zip(states, other_states, strict=True):
        assert torch.isfinite(ours.reconstruction_loss)
        close(ours.reconstruction_loss, theirs.reconstruction_loss)
        real = ours.compressed_real
        assert torch.equal(real, theirs.compressed_real) and not real[2].any()
        close(ours.compressed[real], theirs.compressed[real])
    # the state knows which of its rows are real: a mask of the segment alone is enough
    alone, state = [], None
    for start, end in [(0, 5), (5, 11), (11, 14), (14, 22)]:
        part, state = module(x[:, start:end], mask[:, start:end], state)
        alone.append(part)
    assert torch.equal(torch.cat(alone, dim=1), y)


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_a_batch_of_texts_of_which_one_is_padding_has_the_loss_of_the_others(reconstruction):
    module, x = mixer(4, 3, 2, "convolution", reconstruction), random(2, 12, 12)
    mask = torch.tensor([[True], [False]]).expand(2, 12)
    for ours, alone in zip(run(module, x, [6, 6], mask)[1], run(module, x[:1], [6, 6])[1], strict=True):
        close(ours.reconstruction_loss, alone.reconstruction_loss)


# ----------------------------------------------------------------------------- the two losses


def test_attention_reconstruction_is_algorithm_2():
    module, x = mixer(4, 3, 2), random(2, 12, 12)
    _, states = run(module, x, [6, 6])
    h, old = x[:, 6:], x[:, 2:8]  # rows 0 and 1 went before; of 12 rows 4 stay
    assert states[0].memory.shape[1] == 4
    new, _ = module.compression(old, torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6))

    def attention(rows: Tensor) -> Tensor:
        q, k, v = (
            layer(part).unflatten(-1, (3, 4)).transpose(1, 2)
            for layer, part in [(module.query, h), (module.key, rows), (module.value, rows)]
        )
        return F.scaled_dot_product_attention(q, k, v)

    wanted = F.mse_loss(attention(new), attention(old))
    assert wanted > 1e-3
    close(states[1].reconstruction_loss, wanted)


def test_autoencoding_is_the_error_of_the_old_rows():
    module, x = mixer(4, 3, 2, "convolution", "autoencoding"), random(2, 12, 12)
    _, states = run(module, x, [6, 6])
    old = x[:, 2:8]
    new, _ = module.compression(old, torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6))
    close(states[1].reconstruction_loss, F.mse_loss(module.compression.decode(new), old))


@every_reconstruction
@pytest.mark.parametrize("compression", ["convolution", "dilated"])
def test_each_loss_trains_its_own_parameters_and_no_others(compression, reconstruction):
    config = replace(CONFIG, norm_first=True)

    def make(config: TransformerConfig, layer: int) -> CompressiveAttention:
        return CompressiveAttention(config, 4, 6, 2, compression, reconstruction)

    model = fill_(Decoder(config, token_mixer=make))
    ids = torch.randint(30, (2, 24), generator=torch.Generator().manual_seed(0))
    state, logits, losses = None, [], []
    for part in ids.split(6, dim=1):
        out = model(part, None, state)
        state = out.state
        logits.append(out.logits)
        losses.append(sum(layer.reconstruction_loss for layer in state.layers))
    language = F.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def learners(loss: Tensor) -> set[str]:
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        named = zip(dict(model.named_parameters()), gradients, strict=True)
        return {name for name, gradient in named if gradient is not None and gradient.abs().sum() > 0}

    own = {name for name, _ in model.named_parameters() if ".compression." in name}
    assert len(own) == 2 * (2 + 4 * (compression == "dilated") + 2 * (reconstruction == "autoencoding"))
    assert learners(sum(losses)) == own
    # keys and values too learn from the language model, after many segments
    assert learners(language) == set(dict(model.named_parameters())) - own


@every_reconstruction
@pytest.mark.parametrize("compression", ["convolution", "dilated"])
def test_the_compression_learns_to_reconstruct(compression, reconstruction):
    # rows of one direction each: a convolution of rate 2 can keep all that is needed
    module = mixer(4, 6, 2, compression, reconstruction).float()
    x = torch.cat([random(4, 24, 4, dtype=torch.float32), torch.zeros(4, 24, 8)], dim=-1)
    optimiser = torch.optim.Adam(module.compression.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = sum(state.reconstruction_loss for state in run(module, x, [8, 8, 8])[1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@every_compression
def test_the_state_carries_no_graph_but_the_loss(compression):
    module = mixer(4, 3, 2, compression)
    x = random(2, 12, 12).requires_grad_()
    y, states = run(module, x, [6, 6])
    for state in states:
        carried = (state.memory, state.compressed, state.memory_real, state.compressed_real, state.usage)
        assert not any(part.requires_grad for part in carried)
    y[:, 6:].sum().backward()
    assert x.grad[:, :6].eq(0).all() and x.grad[:, 6:].ne(0).any()


@every_compression
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(compression, dtype):
    module, x = mixer(4, 3, 2, compression).float(), random(2, 15, 12, dtype=torch.float32)
    wanted = run(module, x, [5, 5, 5])[0]
    y, states = run(module.to(dtype), x.to(dtype), [5, 5, 5])
    assert y.dtype == states[-1].memory.dtype == states[-1].compressed.dtype == dtype
    assert states[-1].reconstruction_loss.dtype == torch.float32 and torch.isfinite(states[-1].reconstruction_loss)
    if compression != "most-used":  # where a rounded usage may choose another row
        assert (y.float() - wanted).norm() < 0.03 * wanted.norm()


def test_bad_input_is_refused_by_name():
    for arguments, message in [
        ((-1, 2, 2), "memory_length must be an integer >= 0, got -1"),
        ((2, -1, 2), "compressed_length must be an integer >= 0, got -1"),
        ((2, 2, 0), "rate must be an integer >= 1, got 0"),
        ((2, 2, 2, "sum"), r"compression must be one of \('mean', .*\), got 'sum'"),
        ((2, 2, 2, "mean", "none"), r"reconstruction must be one of \('attention', 'autoencoding'\), got 'none'"),
    ]:
        with pytest.raises(ValueError, match=message):
            CompressiveAttention(CONFIG, *arguments)
    module, x = CompressiveAttention(CONFIG, 4, 2, 2), torch.zeros(2, 5, 12)
    _, state = module(x)
    with pytest.raises(ValueError, match=r"state.memory must be \(1, rows, 12\)"):
        module(x[:1], None, state)
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 5\), got \(2, 4\)"):
        module(x, torch.ones(2, 4, dtype=torch.bool), state)
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        module(x, torch.ones(2, 5))
