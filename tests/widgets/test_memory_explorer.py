"""The explorer of memories: which token is where is what the layers of `attention.compressive` really hold."""

import base64
import itertools

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from effnlp_lessons.attention.compressive import CompressiveAttention
from effnlp_lessons.attention.transformer_xl import TransformerXLAttention
from effnlp_lessons.transformer import Decoder, TransformerConfig
from effnlp_lessons.widgets.memory_explorer import MOST_RATE, MemoryExplorer, held_after, oldest_in_reach
from effnlp_lessons.widgets.memory_picture import COLOURS, FORGOTTEN, FUTURE, HELD, TEXT

LOSSES = {
    "dense": [(8, 0.03), (16, 0.03), (32, 0.04), (64, 0.05)],
    "window": [(8, 0.05), (16, 0.9), (64, 1.8)],
    "linear": [(8, 1.9), (16, 2.0), (32, 2.0), (64, 2.1)],
}
SIZES = {"segment": 8, "memory": 16, "compressed": 6, "rate": 3}
DRAWN = [  # segment, memory, compressed, rate; some leave tokens that wait
    (8, 16, 6, 3), (4, 8, 4, 2), (5, 7, 3, 4), (2, 5, 2, 7), (7, 3, 5, 1), (3, 0, 4, 2), (6, 4, 1, 8), (4, 9, 0, 3),
    (6, 0, 0, 1),
]  # fmt: skip


def set_to(explorer, **values):
    """Set controls one after the other, the segment first, and return the state."""
    for name in sorted(values, key=lambda name: name != "segment"):
        explorer.controls[name].value = values[name]
    assert {name: explorer.values[name] for name in values} == values
    return explorer.state


@pytest.fixture(scope="module")
def anywhere():
    return MemoryExplorer(LOSSES)


def layer_of(memory, compressed, rate, config):
    if compressed == 0:
        return TransformerXLAttention(config, memory)
    return CompressiveAttention(config, memory, compressed, rate, compression="mean")


# ------------------------------------------------------------------------ what is where


@pytest.mark.parametrize("sizes", DRAWN)
def test_the_layer_holds_what_is_shown(sizes):
    """Token p is coded as (2^p for p < 48, 2^(p - 48) beyond): the mean of a slot tells which tokens it covers."""
    segment, memory, compressed, rate = sizes
    config = TransformerConfig(d_model=2, heads=1, layers=1)
    layer = layer_of(memory, compressed, rate, config).double().eval()
    passed = min(96 // segment, 16)
    codes = torch.zeros(1, segment * passed, 2, dtype=torch.float64)
    for token in range(segment * passed):
        codes[0, token, token // 48] = 2.0 ** (token % 48)

    def decode(row, count):
        numbers = [round(float(part) * count) for part in row]
        return [48 * half + bit for half in (0, 1) for bit in range(48) if numbers[half] >> bit & 1]

    state = None
    for number in range(passed):
        _, state = layer(codes[:, number * segment : (number + 1) * segment], None, state)
        held = held_after(number + 1, *sizes)
        rows = state.memory[0] if compressed else state[0]
        assert [decode(row, 1) for row in rows] == [[token] for token in range(*held.memory)]
        slots = [decode(row, rate) for row in state.compressed[0]] if compressed else []
        assert slots == [list(range(*slot)) for slot in held.slots]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("sizes", [(3, 4, 2, 2), (2, 3, 2, 3), (4, 2, 1, 5), (3, 5, 0, 1)])
def test_a_stack_depends_on_what_is_in_reach_and_on_nothing_else(sizes, layers):
    """A changed token changes the last output, in no bit if it lies before the oldest in reach."""
    segment, memory, compressed, rate = sizes
    config = TransformerConfig(
        vocab_size=11, max_length=0, d_model=8, heads=2, layers=layers, d_ff=16, segments=0, pooler=False, dropout=0.0
    )
    decoder = Decoder(config, token_mixer=lambda config, _: layer_of(memory, compressed, rate, config)).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():  # far from 0, so that no influence is rounded away
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    passed = 7
    length = segment * (passed + 1)
    ids = torch.randint(0, 10, (1, length), generator=torch.Generator().manual_seed(0)).repeat(length + 1, 1)
    ids[range(length), range(length)] += 1  # row p has another token at p
    state = None
    with torch.inference_mode():
        for first in range(0, length, segment):
            logits, state = decoder(ids[:, first : first + segment], None, state)
    last = logits[:, -1]
    changed = [token for token in range(length) if not torch.equal(last[token], last[-1])]
    oldest = oldest_in_reach(layers, length - 1, *sizes)
    assert len(oldest) == layers and changed[0] == oldest[-1]
    if layers == 1 and memory:
        assert changed == list(range(oldest[0], length))


def test_range_of_one_layer_and_of_many():
    """On a long text: memory + rate x slots before the segment, and as much again for every layer."""
    for segment, memory, compressed, rate in ((8, 16, 8, 3), (4, 8, 6, 2), (6, 12, 4, 3)):
        start = 40 * segment
        oldest = oldest_in_reach(3, start + segment - 1, segment, memory, compressed, rate)
        held = held_after(40, segment, memory, compressed, rate)
        waiting = held.memory[1] - held.memory[0] - memory
        assert start - oldest[0] == memory + rate * compressed + waiting
        assert 3 * (memory + rate * compressed) <= start - oldest[2] < 3 * (memory + rate * compressed + segment + rate)


def test_the_form_of_the_repeat(anywhere):
    for segment, memory, compressed, rate in DRAWN:
        sizes = {"segment": segment, "memory": memory, "compressed": compressed, "rate": rate}
        for passed, layers in itertools.product((0, 1, 96 // segment - 1), (1, 2)):
            forms = set()
            for distance in (1, segment, segment + memory, segment + memory + rate, 40, 70, 95):
                state = anywhere.numbers(**sizes, passed=passed, layers=layers, distance=distance)
                first, form = passed * segment + segment - 1 - distance, state["form"]
                held = held_after(passed, segment, memory, compressed, rate)
                expected = "none" if first < 0 else "gone"
                if first >= oldest_in_reach(layers, state["query"], **sizes)[-1]:
                    expected = "deeper"
                if any(begin <= first < end for begin, end in held.slots):
                    expected = "compressed"
                if held.memory[0] <= first < held.memory[1]:
                    expected = "memory"
                if first >= passed * segment:
                    expected = "segment"
                assert form == expected and state["first"] == first
                assert (state["place"] is None) == (form in ("none", "gone", "deeper"))
                if form == "compressed":
                    begin, end = held.slots[state["place"][1]]
                    assert begin <= first < end
                forms.add(form)
            assert "segment" in forms


def test_another_segment_length_stays_near_the_place(anywhere):
    set_to(anywhere, segment=8, passed=6)
    anywhere.controls["segment"].value = 16
    assert anywhere.values["passed"] == 3 and anywhere.controls["passed"].max == 5
    anywhere.controls["segment"].value = 5
    assert anywhere.state["segment"] == (50, 55) and anywhere.controls["passed"].max == 18
    set_to(anywhere, segment=2, passed=47)
    anywhere.controls["segment"].value = 16
    assert anywhere.state["segment"] == (80, 96)


def test_it_opens_at_the_beginning_of_the_text():
    explorer = MemoryExplorer()
    assert explorer.values == {"passed": 0, "distance": 1, **SIZES, "layers": 2}
    state = explorer.state
    assert state["form"] == "segment" and state["slots"] == [] and state["memory"] == (0, 0) and state["losses"] == {}


def test_without_compressed_slots_the_rate_is_idle(anywhere):
    set_to(anywhere, compressed=0)
    assert anywhere.controls["rate"].disabled
    set_to(anywhere, compressed=2)
    assert not anywhere.controls["rate"].disabled


def test_recorded_losses(anywhere):
    recorded = set_to(anywhere, distance=16)["losses"]
    assert recorded == {"dense": (0.03, False), "window": (0.9, False), "linear": (2.0, False)}
    assert set_to(anywhere, distance=32)["losses"]["window"] == (pytest.approx(1.35), True)  # half way in octaves
    assert set_to(anywhere, distance=7)["losses"] == dict.fromkeys(LOSSES) == set_to(anywhere, distance=65)["losses"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"length": 23}, "length must be in 24 .. 768, got 23"),
        ({"segment": 17}, "segment must be in 2 .. 16, got 17"),
        ({"memory": 25}, "memory must be in 0 .. 24, got 25"),
        ({"compressed": 13}, "compressed must be in 0 .. 12, got 13"),
        ({"rate": 0}, "rate must be in 1 .. 8, got 0"),
        ({"passed": 12}, "passed must be in 0 .. 11, got 12"),
        ({"distance": 96}, "distance must be in 1 .. 95, got 96"),
        ({"layers": 5}, "layers must be in 1 .. 4, got 5"),
        ({"losses": {}}, "losses must have 1 to 8 models, got 0"),
        ({"losses": {"a": []}}, "losses\\['a'\\] must have rising lags"),
        ({"losses": {"a": [(0, 1.0)]}}, "rising lags of at least 1"),
        ({"losses": {"a": [(8, 1.0), (8, 2.0)]}}, "rising lags of at least 1"),
        ({"losses": {"a": [(8, float("nan"))]}}, "finite losses"),
        ({"losses": {"a": [(8, -0.1)]}}, "finite losses"),
    ],
)
def test_bad_input_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        MemoryExplorer(**values)


# ------------------------------------------------------------------------ picture and words

PICTURES = [
    {},
    {"passed": 8, "distance": 40, "layers": 3},
    {"losses": LOSSES, "passed": 9, "distance": 45, "memory": 8, "compressed": 4, "rate": 5},
    {"length": 384, "segment": 32, "memory": 64, "compressed": 32, "passed": 9, "distance": 200},
    {"losses": {f"model of number {i}": [(64, i)] for i in range(8)}, "length": 24, "segment": 4, "memory": 6,
     "compressed": 3},
]  # fmt: skip


@pytest.mark.parametrize("values", PICTURES)
def test_the_picture_is_drawn_whole(values, shown, drawn_anew):
    explorer = MemoryExplorer(**values)
    picture = shown(explorer)
    assert picture.shape == (560 if "losses" in values else 300, 900, 3)
    assert np.array_equal(picture, drawn_anew(explorer))
    before = explorer.values
    set_to(explorer, passed=2, distance=5, compressed=1, layers=1)
    set_to(explorer, **before)
    assert np.array_equal(shown(explorer), picture)


def test_the_cells_have_the_colours_of_where_the_tokens_are(shown):
    explorer = MemoryExplorer(passed=8, distance=95)
    picture, state, drawn = shown(explorer).astype(int), explorer.state, explorer._picture
    where = ["forgotten"] * state["forgotten"] + ["compressed"] * sum(end - begin for begin, end in state["slots"])
    where += ["memory"] * 16 + ["segment"] * 8
    where += ["future"] * (96 - len(where))
    assert where.index("memory") == state["memory"][0] == 48 and where.index("future") == state["segment"][1]
    colours = {**COLOURS, "forgotten": FORGOTTEN, "future": FUTURE}
    for token, part in enumerate(where):
        if token == state["query"]:
            continue
        pixel = picture[TEXT + 7, round(drawn.x_of(token + 0.5))]
        assert np.abs(pixel - 255 * np.array(to_rgb(colours[part]))).max() <= 1, (token, part)
    for part, used in (("compressed", 6), ("memory", 16), ("segment", 8)):
        for place in range(used):
            pixel = picture[HELD + 11, round(drawn.place_of(part, place) + drawn._slot / 2)]
            assert np.abs(pixel - 255 * np.array(to_rgb(COLOURS[part]))).max() <= 1, (part, place)


def test_bands_lead_from_every_place_to_its_tokens():
    explorer = MemoryExplorer(passed=8, distance=95)
    drawn, held = explorer._picture, held_after(8, 8, 16, 6, 3)
    bands = [path.vertices[:4] for path in drawn._bands.get_paths()]
    ends = [(begin, end) for begin, end in (*held.slots, held.memory, (64, 72))]
    assert len(bands) == len(ends) == 8
    for band, (begin, end) in zip(bands, ends, strict=True):
        assert band[2:, 0] == pytest.approx([drawn.x_of(end), drawn.x_of(begin)])
    for one, other in itertools.pairwise(bands):  # they do not cross
        assert one[1, 0] < other[0, 0] and one[2, 0] <= other[3, 0]


def test_bars_reach_from_the_oldest_token_in_reach(anywhere):
    state, drawn = set_to(anywhere, **SIZES, passed=9, layers=4, distance=30), anywhere._picture
    bars = [path.vertices[:4, 0] for path in drawn._bars.get_paths()]
    expected = oldest_in_reach(4, state["query"], **SIZES)
    assert state["oldest"] == expected
    assert [bar.min() for bar in bars] == pytest.approx([drawn.x_of(token) for token in expected])
    assert [text.get_text() for text in drawn._reaches][0] == f"1 layer: {state['query'] - expected[0]}"


@pytest.mark.parametrize("values", PICTURES)
def test_no_words_leave_the_picture_or_meet(values):
    explorer = MemoryExplorer(**values)
    longest = {"memory": explorer.controls["memory"].max - 1, "rate": MOST_RATE, "layers": 4}
    last = explorer.controls["passed"].max
    for changed in ({}, {"passed": last}, {"passed": last, "distance": 3}, longest, {"passed": 0, "distance": 2}):
        set_to(explorer, **changed)
        renderer = explorer.figure.canvas.get_renderer()
        axes = explorer.figure.axes
        words = [t for t in axes[0].texts if t.get_text() and t.get_visible()]
        words += [t for other in axes[1:] for t in (*other.get_xticklabels(), *other.get_yticklabels())]
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in words]
        for place, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.x1 <= 900 and box.y0 >= 0 and box.y1 <= explorer.pixels.shape[0], text
            for other, second in boxes[place + 1 :]:
                assert not box.overlaps(second), (text, other)


def test_words(anywhere):
    set_to(anywhere, **SIZES, passed=8, distance=40, layers=3)
    line = anywhere.line.value
    assert "Segment 9 is read (tokens 64 to 71). The token 40 back: compressed, in slot 1 of 6, one of 3" in line
    assert "16 + 3 x 6 = 34 tokens, 3 layers over 3 x 34 = 102; of this text, now: 1 layer 41 back" in line
    assert "at 40 tokens (≈: interpolated): dense ≈ 0.04; window ≈ 1.49; linear ≈ 2.03." in line
    assert "Compressed slots: tokens 30 to 32, 33 to 35" in anywhere.alt and "Memory: 48 to 63." in anywhere.alt
    set_to(anywhere, distance=8)
    assert "The token 8 back: exact, in the memory" in anywhere.line.value and "dense 0.03;" in anywhere.line.value
    set_to(anywhere, distance=7)
    assert "exact, in the same segment" in anywhere.line.value and "dense not recorded" in anywhere.line.value
    set_to(anywhere, distance=60)
    assert "gone from this layer; 3 layers reach it" in anywhere.line.value
    set_to(anywhere, layers=1)
    assert "gone, out of reach" in anywhere.line.value
    set_to(anywhere, distance=80)
    assert "the text began later" in anywhere.line.value
    set_to(anywhere, rate=7)
    assert "16 tokens in memory, 6 more that wait until they are 7" in anywhere.line.value
    data, metadata = anywhere._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == anywhere.image.value
    assert metadata["image/png"]["alt"] == anywhere.alt == anywhere.image.tooltip


def test_events_are_fast(assert_fast):
    """On a text four times as long as at the start."""
    explorer = MemoryExplorer(LOSSES, length=384, segment=4, layers=4)
    assert_fast("segments passed", lambda turn: set_to(explorer, passed=turn + 12))
    assert_fast("distance", lambda turn: set_to(explorer, distance=20 + turn))
    assert_fast("memory", lambda turn: set_to(explorer, memory=10 + turn))
    assert_fast("segment", lambda turn: set_to(explorer, segment=3 + turn % 8))
