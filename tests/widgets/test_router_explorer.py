"""The explorer of the router: its numbers are those of Algorithm 1, token by token, its cells are those numbers."""

import base64
import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.transforms import Bbox

from effnlp_lessons.architectures import gshard
from effnlp_lessons.widgets import router_explorer
from effnlp_lessons.widgets.flash_tiles import ink_of
from effnlp_lessons.widgets.router_explorer import (
    EXPERTS,
    FACTORS,
    LEAST_TOKENS,
    POLICIES,
    SKEWS,
    RouterExplorer,
    made_up_draws,
    made_up_logits,
)
from effnlp_lessons.widgets.router_picture import (
    ARROW_TOP,
    BARS,
    BARS_WIDTH,
    BUFFERS_TOP,
    CELL,
    CHOICE_HEIGHT,
    CHOICE_TOPS,
    FILLED_AT,
    HEIGHT,
    HEIGHTS,
    LEFT,
    MOST_TOKENS,
    NOT_DRAWN,
    REFUSED,
    REFUSED_AT,
    RESIDUAL_TOP,
    SMALL,
    STEM_TOP,
    TAKEN,
    TOKEN_HEIGHT,
    TOKENS_TOP,
    WALL,
    WIDTH,
    cell_look,
)

OPENED = {"tokens": 32, "experts": 8, "capacity_factor": 2.0, "top_k": 2, "policy": "all", "skew": 0.0}
SETTINGS = [
    OPENED | values
    for values in (
        {},
        {"capacity_factor": 0.25},
        {"capacity_factor": 0.5, "policy": "random"},
        {"capacity_factor": 1.0, "policy": "random", "skew": 1.5},
        {"capacity_factor": 0.75, "tokens": 47, "skew": 0.5},
        {"capacity_factor": 1.0, "top_k": 1, "policy": "random", "skew": 0.25},
        {"capacity_factor": 0.25, "top_k": 1, "tokens": 48, "experts": 16, "skew": 3.0},
        {"capacity_factor": 1.25, "tokens": 48, "experts": 16, "skew": 3.0, "policy": "random"},
        {"capacity_factor": 0.5, "tokens": 48, "experts": 4, "skew": 3.0},
        {"capacity_factor": 4.0, "tokens": 48, "experts": 4, "skew": 3.0, "policy": "random"},
        {"capacity_factor": 0.25, "tokens": 4, "experts": 16},
        {"capacity_factor": 0.25, "tokens": 5, "experts": 4, "top_k": 1},
    )
]


@pytest.fixture(scope="module")
def shared():
    return RouterExplorer()


@pytest.fixture
def explorer(shared):
    set_to(shared, **OPENED)
    return shared


def set_to(explorer, **values):
    for name, value in values.items():
        explorer.controls[name].value = value
    return explorer.state


def slow_routing(tokens, experts, capacity_factor, top_k, policy, skew):
    """Algorithm 1, or Switch's rule, in plain Python: one token after the other, one counter an expert."""
    scores = made_up_logits(tokens, experts, skew).double().tolist()
    r = made_up_draws(tokens).tolist()
    gates = []
    for row in scores:
        total = sum(math.exp(score) for score in row)
        gates.append([math.exp(score) / total for score in row])
    order = [sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:top_k] for row in gates]
    capacity = min(tokens, math.ceil(capacity_factor * top_k * tokens / experts))
    counters, buffers, status, places = [0] * experts, {e: [] for e in range(experts)}, {}, {}
    first_counts = [0] * experts
    for choice in range(top_k):
        for token in range(tokens):
            expert = order[token][choice]
            asked = True
            if choice == 1 and policy == "random":
                g1, g2 = (gates[token][e] for e in order[token])
                asked = 2 * g2 / (g1 + g2) > r[token]
            if asked and counters[expert] < capacity:
                buffers[expert].append((token, choice))
                status[token, choice] = TAKEN
            else:
                status[token, choice] = REFUSED if asked else NOT_DRAWN
            places[token, choice] = counters[expert]
            counters[expert] += 1
        if choice == 0:
            first_counts = list(counters)
    means = [sum(row[e] for row in gates) / tokens for e in range(experts)]
    loss = sum(c / tokens * m for c, m in zip(first_counts, means, strict=True)) / experts
    return {
        "capacity": capacity,
        "chosen": order,
        "places": places,
        "status": status,
        "buffers": buffers,
        "share": [count / tokens for count in first_counts],
        "mean gate": means,
        "loss": loss,
    }


# ------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_number_is_that_of_the_slow_algorithm(explorer, setting):
    state, slow = explorer.numbers(**setting), slow_routing(**setting)
    tokens, experts, top_k = setting["tokens"], setting["experts"], setting["top_k"]
    kinds = list(slow["status"].values())
    by_token = [[slow["status"][token, choice] for choice in range(top_k)] for token in range(tokens)]
    placed = [row.count(TAKEN) for row in by_token]
    filled = [len(slow["buffers"][e]) for e in range(experts)]
    refused = [
        sum(slow["status"][token, k] == REFUSED and slow["chosen"][token][k] == e for token, k in slow["status"])
        for e in range(experts)
    ]
    assert state["capacity"] == slow["capacity"]
    assert state["chosen"].tolist() == slow["chosen"]
    assert state["status"].tolist() == by_token
    assert state["places"].tolist() == [[slow["places"][t, k] for k in range(top_k)] for t in range(tokens)]
    assert state["choices"] == top_k * tokens == len(kinds)
    assert state["refused choices"] == kinds.count(REFUSED) == sum(refused)
    assert state["not drawn"] == kinds.count(NOT_DRAWN)
    assert state["lost"] == [token for token in range(tokens) if placed[token] == 0]
    assert state["partly"] == (placed.count(1) if top_k == 2 else 0)
    assert state["filled"].tolist() == filled and state["refused"].tolist() == refused
    assert state["slots"] == experts * slow["capacity"] and state["wasted"] == state["slots"] - sum(filled)
    assert state["share"] == pytest.approx(slow["share"], abs=1e-6)
    assert state["mean gate"] == pytest.approx(slow["mean gate"], abs=1e-6)
    assert state["auxiliary loss"] == pytest.approx(
        {"paper": slow["loss"], "switch": slow["loss"] * experts**2}, rel=1e-5
    )


def test_the_settings_show_every_case():
    """Refused first and second choices, holes of choices not drawn, tokens with 0, 1 and 2 experts, a capped C."""
    seen = set()
    for setting in SETTINGS:
        slow = slow_routing(**setting)
        seen |= {(kind, k) for (_, k), kind in slow["status"].items()}
        holes = [
            at for at, kind in slow["status"].items() if kind == NOT_DRAWN and slow["places"][at] < slow["capacity"]
        ]
        seen |= {"hole"} if holes else set()
        seen |= {"capped"} if slow["capacity"] == setting["tokens"] else set()
    assert seen == {"hole", "capped"} | {(TAKEN, 0), (TAKEN, 1), (REFUSED, 0), (REFUSED, 1), (NOT_DRAWN, 1)}


def test_it_is_fed_by_the_library(explorer, monkeypatch):
    """An error in the library's routing is seen in the explorer: it has no routing of its own."""
    calls = []
    for name in ("gshard_routing", "switch_routing", "expert_capacity"):

        def counted(*args, _name=name, **options):
            calls.append(_name)
            return getattr(gshard, _name)(*args, **options)

        monkeypatch.setattr(router_explorer, name, counted)
    explorer.numbers(**OPENED)
    assert set(calls) == {"gshard_routing", "expert_capacity"}
    calls.clear()
    explorer.numbers(**OPENED | {"top_k": 1})
    assert set(calls) == {"switch_routing", "expert_capacity"}


def test_one_control_changes_one_thing():
    """Tokens keep their scores and r when others come, experts too; nothing global is drawn."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    router_explorer._made_up.cache_clear()
    all_logits, all_draws = made_up_logits(MOST_TOKENS, EXPERTS[-1], 0.0), made_up_draws(MOST_TOKENS)
    assert torch.equal(torch.random.get_rng_state(), before)
    router_explorer._made_up.cache_clear()
    for tokens, experts in itertools.product((LEAST_TOKENS, 17, MOST_TOKENS), EXPERTS):
        assert torch.equal(made_up_logits(tokens, experts, 0.0), all_logits[:tokens, :experts])
        assert torch.equal(made_up_draws(tokens), all_draws[:tokens])
    assert all_logits.mean().abs() < 0.15 and abs(all_logits.std() - 1) < 0.1  # 768 numbers from N(0, 1)
    skewed = made_up_logits(7, 8, 2.0) - made_up_logits(7, 8, 0.0)
    assert torch.allclose(skewed.exp(), 1 / torch.arange(1.0, 9.0) ** 2)


def test_tokens_that_come_later_change_no_first_choice_before_them(explorer):
    few, many = set_to(explorer, tokens=20), set_to(explorer, tokens=21)
    assert np.array_equal(few["chosen"], many["chosen"][:20])
    assert np.array_equal(few["places"][:, 0], many["places"][:20, 0])


def test_it_opens_with_nothing_dropped():
    explorer = RouterExplorer()
    state = explorer.state
    assert explorer.values == OPENED
    assert state["capacity"] == 16 and state["slots"] == 128 and state["wasted"] == 64
    assert not state["lost"] and state["refused choices"] == state["not drawn"] == state["partly"] == 0


def test_less_capacity_and_more_skew_drop_more_and_more_capacity_wastes_more(explorer):
    """What the explorer is there to show."""
    lost = [len(set_to(explorer, capacity_factor=factor)["lost"]) for factor in (2.0, 1.0, 0.75, 0.5, 0.25)]
    assert lost == sorted(lost) and lost[0] == 0 < lost[-1]
    wasted = [set_to(explorer, capacity_factor=factor)["wasted"] for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert wasted == sorted(wasted)
    set_to(explorer, capacity_factor=1.0)
    states = [set_to(explorer, skew=skew) for skew in (0.0, 1.0, 2.0, 3.0)]
    for number in ("refused choices", "wasted"):
        assert [state[number] for state in states] == sorted(state[number] for state in states)
    losses = [state["auxiliary loss"]["switch"] for state in states]
    assert losses == sorted(losses) and abs(losses[0] - 1) < 0.2 and losses[-1] > 3


# ------------------------------------------------------------------------ controls


def test_policy_is_greyed_for_switch(explorer):
    set_to(explorer, top_k=1)
    assert [name for name, control in explorer.controls.items() if control.disabled] == ["policy"]
    first = explorer.state
    assert np.array_equal(set_to(explorer, policy="random")["status"], first["status"])
    set_to(explorer, top_k=2)
    assert not any(control.disabled for control in explorer.controls.values())


def test_every_choice_can_be_given():
    for name, offered in (("experts", EXPERTS), ("policy", POLICIES), ("top_k", (1, 2))):
        for value in offered:
            assert RouterExplorer(**{name: value}).values == OPENED | {name: value}
    for values in ({"tokens": 4}, {"tokens": 48}, {"capacity_factor": 4}, {"capacity_factor": 0.25}, {"skew": 3}):
        assert RouterExplorer(**values).values == OPENED | values


def test_the_sliders_go_where_the_arguments_may(explorer):
    for name, offered in (("capacity_factor", FACTORS), ("skew", SKEWS)):
        control = explorer.controls[name]
        assert tuple(np.arange(control.min, control.max + control.step / 2, control.step)) == offered
    assert (explorer.controls["tokens"].min, explorer.controls["tokens"].max) == (LEAST_TOKENS, MOST_TOKENS)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokens": 3}, r"tokens must be in 4 \.\. 48, got 3"),
        ({"tokens": 49}, r"tokens must be in 4 \.\. 48, got 49"),
        ({"experts": 2}, "experts must be one of 4, 8, 16, got 2"),
        ({"capacity_factor": 0.0}, r"capacity_factor must be in 0\.25 \.\. 4 in steps of 0\.25, got 0\.0"),
        ({"capacity_factor": 1.1}, r"capacity_factor must be in 0\.25 \.\. 4 in steps of 0\.25, got 1\.1"),
        ({"capacity_factor": math.nan}, "capacity_factor must be in .*, got nan"),
        ({"top_k": 3}, "top_k must be 1 or 2, got 3"),
        ({"policy": "none"}, "policy must be 'all' or 'random', got 'none'"),
        ({"skew": -0.25}, r"skew must be in 0 \.\. 3 in steps of 0\.25, got -0\.25"),
    ],
)
def test_bad_input_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        RouterExplorer(**values)


# ------------------------------------------------------------------------ the picture


def test_the_picture_is_drawn_whole_and_another_for_each_control(explorer, shown, drawn_anew):
    pictures = []
    for values in (
        {}, {"capacity_factor": 0.5}, {"tokens": 48}, {"policy": "random"}, {"skew": 2.0}, {"top_k": 1},
        {"experts": 16}, {"experts": 4},
    ):  # fmt: skip
        set_to(explorer, **OPENED | values)
        picture = shown(explorer)
        assert picture.shape == (HEIGHT, WIDTH, 3) and np.array_equal(picture, drawn_anew(explorer))
        assert all(not np.array_equal(picture, other) for other in pictures)
        pictures.append(picture)
    set_to(explorer, **OPENED)
    assert np.array_equal(shown(explorer), pictures[0])


def kinds_of(setting):
    """Looks and numbers of the cells by the slow algorithm: {(left, top): (kind, text, height)}, and lost tokens."""
    slow, cells = slow_routing(**setting), {}
    tokens, experts, top_k = setting["tokens"], setting["experts"], setting["top_k"]
    pitch, height = HEIGHTS[experts]
    looks = {(TAKEN, 0): "first", (TAKEN, 1): "second", (REFUSED, 0): "refused", (REFUSED, 1): "refused"}
    for expert, place in itertools.product(range(experts), range(slow["capacity"])):
        cells[LEFT + CELL * place, BUFFERS_TOP + pitch * expert] = ("empty", "", height)
    for (token, choice), status in slow["status"].items():
        kind, expert = looks.get((status, choice), "not drawn"), slow["chosen"][token][choice]
        cells[LEFT + CELL * token, CHOICE_TOPS[choice]] = (kind, str(expert), CHOICE_HEIGHT)
        place = slow["places"][token, choice]
        cells[LEFT + CELL * place + WALL * (place >= slow["capacity"]), BUFFERS_TOP + pitch * expert] = (
            kind,
            str(token),
            height,
        )
    lost = [t for t in range(tokens) if all(slow["status"][t, k] != TAKEN for k in range(top_k))]
    for token in range(tokens):
        cells[LEFT + CELL * token, TOKENS_TOP] = ("lost" if token in lost else "token", str(token), TOKEN_HEIGHT)
    return cells, lost, slow


@pytest.mark.parametrize("setting", SETTINGS)
def test_cells_arrows_frames_and_bars_show_the_numbers(explorer, shown, setting):
    set_to(explorer, **setting)
    picture = shown(explorer)
    cells, lost, slow = kinds_of(setting)
    for (x, y), (kind, text, height) in cells.items():
        look = cell_look(kind, text, height)
        assert np.array_equal(picture[y : y + look.shape[0], x : x + look.shape[1]], look), (x, y, kind, text)
    for token in range(MOST_TOKENS):
        x = LEFT + CELL * token
        arrow = (picture[STEM_TOP:RESIDUAL_TOP, x : x + CELL] != 255).any()
        assert arrow == (token in lost)
        if token >= setting["tokens"]:
            assert (picture[TOKENS_TOP:RESIDUAL_TOP, x : x + CELL] == 255).all()
    if setting["top_k"] == 1:
        assert (picture[CHOICE_TOPS[1] : STEM_TOP, :640] == 255).all()
    pitch, height = HEIGHTS[setting["experts"]]
    for expert in range(setting["experts"]):
        row = picture[BUFFERS_TOP + pitch * expert - 2, LEFT - 2 : LEFT + CELL * MOST_TOKENS + WALL]
        assert (row == 0).all(1).sum() == CELL * slow["capacity"] + WALL + 1  # the frame is as long as the buffer
        middle = BUFFERS_TOP + pitch * expert + height / 2 - 1
        for x, count in ((FILLED_AT, len(slow["buffers"][expert])), (REFUSED_AT, explorer.state["refused"][expert])):
            ink = ink_of(str(count), SMALL)
            top, left = round(middle - ink.shape[0] / 2), round(x - ink.shape[1] / 2)
            part = 255 - picture[top : top + ink.shape[0], left : left + ink.shape[1], 2].astype(int)
            assert np.abs(part - ink).max() <= 1
    for name, bars in explorer._picture._bars.items():
        widths = [np.ptp(path.vertices[:4, 0]) for path in bars.get_paths()]
        assert widths == pytest.approx([BARS_WIDTH * value for value in slow[name]], abs=1e-3)
        assert all(path.vertices[:4, 0].min() == BARS for path in bars.get_paths())


def test_looks_differ_in_shape_and_not_only_in_colour():
    """In grey, too: light and dark of the cells, and the arrow of a lost token stands where there is nothing else."""
    kinds = ("first", "second", "refused", "not drawn", "empty")
    for height in {CHOICE_HEIGHT, *(height for _, height in HEIGHTS.values())}:
        grey = {kind: cell_look(kind, "" if kind == "empty" else "17", height).mean(2) for kind in kinds}
        for one, other in itertools.combinations(kinds, 2):
            assert np.abs(grey[one] - grey[other]).max() > 60, (one, other)
        token, lost = (cell_look(kind, "17", TOKEN_HEIGHT).mean(2) for kind in ("token", "lost"))
        assert token[0, 0] - lost[0, 0] > 200
        struck, plain = grey["refused"], grey["second"]
        assert struck[0, 0] == struck[-1, -1] == struck[-1, 0] < 120 and len(np.unique(plain[:2])) == 1


def test_arrows_point_down(explorer, shown):
    state = set_to(explorer, capacity_factor=0.25)
    picture = shown(explorer)
    for token in state["lost"]:
        x = LEFT + CELL * token
        widths = (picture[STEM_TOP : RESIDUAL_TOP + 1, x : x + CELL] != 255).any(2).sum(1)
        stem, head = widths[: ARROW_TOP - STEM_TOP], widths[ARROW_TOP - STEM_TOP : RESIDUAL_TOP - STEM_TOP]
        assert set(stem) == {2} and head[0] == 10 and head[-1] <= 2 and (np.diff(head) <= 0).all()
        assert widths[-1] == CELL  # the line of the residual


@pytest.mark.parametrize("experts", EXPERTS)
def test_no_words_leave_the_picture_or_meet(explorer, experts):
    right = LEFT + CELL * MOST_TOKENS
    grid = Bbox.from_extents(LEFT - 2, HEIGHT - BUFFERS_TOP - 256, right + WALL, HEIGHT - BUFFERS_TOP + 2)
    strip = Bbox.from_extents(LEFT, HEIGHT - RESIDUAL_TOP - 3, right, HEIGHT - TOKENS_TOP)
    for values in (
        {}, {"tokens": 47, "capacity_factor": 0.25, "skew": 3.0}, {"tokens": 43, "capacity_factor": 3.75},
        {"tokens": 48, "top_k": 1, "skew": 3.0}, {"tokens": 33, "capacity_factor": 0.75, "policy": "random"},
    ):  # fmt: skip
        set_to(explorer, **OPENED | values | {"experts": experts})
        renderer = explorer.figure.canvas.get_renderer()
        texts = [text for text in explorer.figure.axes[0].texts if text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts] + [
            ("grid", grid),
            ("strip", strip),
        ]
        for place, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.x1 <= WIDTH and box.y0 >= 0 and box.y1 <= HEIGHT, text
            for other, second in boxes[place + 1 :]:
                assert not box.overlaps(second), (text, other, explorer.values)


# ------------------------------------------------------------------------ words


def test_words(explorer):
    setting = OPENED | {"capacity_factor": 0.5, "policy": "random", "skew": 1.0, "tokens": 33}
    state, slow = set_to(explorer, **setting), slow_routing(**setting)
    line, alt, kinds = explorer.line.value, explorer.alt, list(slow["status"].values())
    lost, filled = len(state["lost"]), sum(map(len, slow["buffers"].values()))
    assert lost > 1 and slow["capacity"] == 5
    assert f"{lost} of 33 tokens find no expert: the residual alone carries them." in line
    assert "33 tokens, 8 experts, top-2 (GShard), second experts asked: random, skew 1." in line
    assert "C = 0.5 x 2 x 33 / 8 = 5, rounded up." in line
    refused = kinds.count(REFUSED)
    assert (
        f"Refused: {refused} of 66 ({100 * refused / 66:.1f} %) choices; not drawn: {kinds.count(NOT_DRAWN)};" in line
    )
    assert f"on the residual alone: {lost} of 33 ({100 * lost / 33:.1f} %) tokens, with one expert of two:" in line
    assert f"computed as zeros: {40 - filled} of 40 ({100 * (40 - filled) / 40:.1f} %)." in line
    assert f"Auxiliary loss {slow['loss']:.4f} in the paper's scale (balanced: 0.0156)" in line
    assert f"{64 * slow['loss']:.2f} in Switch's (balanced: 1)." in line
    assert f"down to the line of the residual: {', '.join(map(str, state['lost']))}." in alt
    for expert in range(8):
        expected = f"{expert}: {len(slow['buffers'][expert])} filled, {state['refused'][expert]} refused, "
        expected += f"{slow['share'][expert]:.3f}, {slow['mean gate'][expert]:.3f}"
        assert expected in alt
    assert explorer.summary(state) in alt
    queues = [len(slow["buffers"][e]) + state["refused"][e] for e in range(8)]
    assert f"Most asked: expert {np.argmax(queues)}, by {max(queues)} tokens (C = 5)" in line
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert metadata["image/png"]["alt"] == explorer.alt == explorer.image.tooltip


def test_words_of_other_states(explorer):
    assert "All 32 tokens find a place with every expert that they ask." in explorer.line.value
    assert "C = 2 x 2 x 32 / 8 = 16. Refused: 0 of 64 (0.0 %) choices; without" in explorer.line.value
    set_to(explorer, capacity_factor=4.0, experts=4)
    assert "C = 32, all tokens, for 4 x 2 x 32 / 4 = 64." in explorer.line.value
    state = set_to(explorer, capacity_factor=0.25)  # all buffers are full, but not all experts are asked alike
    asked = np.bincount(state["chosen"].ravel())
    assert asked.argmax() > 0 and set(state["filled"]) == {state["capacity"]}
    assert f"Most asked: expert {asked.argmax()}, by {asked.max()} tokens (C = {state['capacity']});" in explorer.alt
    set_to(explorer, experts=8, capacity_factor=1.0, top_k=1)
    assert "top-1 (Switch), skew 0." in explorer.line.value and "of two" not in explorer.line.value
    assert "not drawn" not in explorer.line.value
    written = [explorer._picture._words[name].get_text() for name in ("refused", "lost", "wasted", "loss")]
    for text in written[:3]:
        assert text in explorer.line.value
    losses = explorer.state["auxiliary loss"]
    assert written[3] == f"{losses['paper']:.4f} (paper), {losses['switch']:.2f} (Switch)"
    assert explorer._picture._words["heading"].get_text() in explorer.line.value


def test_singular_words(explorer):
    headings = {}
    for setting in itertools.product(range(LEAST_TOKENS, 33), (0.5, 0.75, 1.0, 1.25)):
        state = explorer.numbers(**OPENED | {"tokens": setting[0], "capacity_factor": setting[1]})
        headings[min(len(state["lost"]), 2), min(state["refused choices"], 2)] = explorer.summary(state)
    assert "tokens finds no expert: the residual alone carries it." in headings[1, 2]
    assert "tokens find an expert, but 1 of their choices is refused." in headings[0, 1]


def test_an_event_is_fast(explorer, assert_fast):
    set_to(explorer, tokens=48, capacity_factor=4.0, experts=16)
    sliders = (("tokens", (47, 48)), ("capacity_factor", (0.25, 4.0)), ("skew", (1.0, 3.0)))
    for name, values in (*sliders, ("top_k", (1, 2)), ("policy", POLICIES)):
        assert_fast(name, lambda turn, name=name, values=values: set_to(explorer, **{name: values[turn % 2]}))
