"""The study of passages printed twice: its models and pages, a small run, and the recorded summary."""

from statistics import mean

import pytest
import torch
from torch.nn import functional as F

from effnlp_lessons.datasets import shakespeare
from effnlp_lessons.studies import printed_twice
from effnlp_lessons.studies.printed_twice import LAGS, PAGE, PASSAGE, REACH, RECURRENT, SEGMENT, build, read, twice
from effnlp_lessons.studies.runner import load_results

SMALL = {"pages": "repeats", "steps": 2, "batch": 2, "rate": 1e-3, "passages": 3}


# ------------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("lag", LAGS)
def test_a_passage_stands_twice_lag_characters_apart_and_is_the_same_for_every_lag(lag):
    pages, others = twice(lag, 5), twice(24, 5)
    assert pages.shape == (5, PAGE)
    assert torch.equal(pages[:, -PASSAGE:], pages[:, PAGE - PASSAGE - lag : PAGE - lag])
    assert torch.equal(pages[:, -PASSAGE:], others[:, -PASSAGE:])
    passage = shakespeare.decode(pages[0, -PASSAGE:])
    assert passage in shakespeare.load_text("dev") and passage not in shakespeare.load_text("train")


@pytest.mark.parametrize("lag", [PASSAGE - 1, PAGE - PASSAGE + 1])
def test_copies_that_overlap_or_do_not_fit_are_refused(lag):
    with pytest.raises(ValueError, match=f"lag must be in 24 .. 168, got {lag}"):
        twice(lag, 1)


def test_training_pages_repeat_with_their_seed_and_hold_what_stood_before():
    pages, again, other = (printed_twice.Pages(9, "repeats", seed) for seed in (3, 3, 4))
    batch = pages.batch([1, 2, 3, 5])
    assert torch.equal(batch, again.batch([1, 2, 3, 5])) and not torch.equal(batch, other.batch([1, 2, 3, 5]))
    for page in batch.tolist():
        repeated = sum(page[i : i + PASSAGE] in [page[j : j + PASSAGE] for j in range(i)] for i in range(PAGE))
        assert repeated >= 3
    plain = printed_twice.Pages(9, "plain", 3).page(4)
    assert shakespeare.decode(plain) in shakespeare.load_text("train")


def test_copies_are_cut_at_the_same_characters():
    """Losses that are the characters' numbers: both copies then show the same passage."""
    pages = twice(48, 1)
    first, second = printed_twice.copies(pages[:, 1:].double(), 48)
    assert first.tolist() == second.tolist() == pages[0, -PASSAGE:].tolist()


# ------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("name", REACH)
def test_read_is_the_loss_of_the_model_and_causal(name):
    model = build(name, 0)
    pages = twice(64, 2)
    segment = SEGMENT if name in RECURRENT else None
    losses, rebuilt = read(model, pages, segment)
    changed = pages.clone()
    changed[:, 100:] = 0
    assert torch.equal(losses[:, :99], read(model, changed, segment)[0][:, :99])
    wanted = F.cross_entropy(model(pages[:, :-1]).logits.transpose(1, 2), pages[:, 1:], reduction="none")
    if name in RECURRENT:  # one segment for all is another model: it sees everything
        torch.testing.assert_close(losses[:, :SEGMENT], wanted[:, :SEGMENT], rtol=1e-5, atol=1e-5)
        assert (losses - wanted).abs().max() > 1e-3
    else:
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    assert (rebuilt > 0) == name.startswith("compressive")


@pytest.mark.parametrize("name", ["linear", "softmax"])
def test_segments_make_no_difference_to_a_model_that_forgets_nothing(name):
    model, pages = build(name, 1).double(), twice(24, 2)
    whole, pieces = read(model, pages)[0], read(model, pages, 37)[0]
    torch.testing.assert_close(whole, pieces, rtol=1e-10, atol=1e-10)


def test_the_window_model_does_not_see_past_two_windows_and_the_predecessors():
    model, pages = build("window-32", 0), twice(64, 1)
    changed = pages.clone()
    changed[:, :100] = 0
    reach = 2 * (printed_twice.WINDOW + printed_twice.PREDECESSORS)
    before, after = read(model, pages)[0], read(model, changed)[0]
    assert torch.equal(before[:, 100 + reach :], after[:, 100 + reach :])
    assert not torch.equal(before[:, 100], after[:, 100])


@pytest.mark.parametrize("name", RECURRENT)
def test_one_layer_reaches_as_far_as_reach_says(name):
    """A change at the last position in reach of the last segment is seen, one before it is not."""
    torch.manual_seed(0)
    config = build(name, 0).config
    mixer = printed_twice.token_mixer(name, config)
    x = torch.randn(1, 7 * SEGMENT, config.d_model)

    def last(x):
        state = None
        for piece in x.split(SEGMENT, 1):
            y, state = mixer(piece, None, state)
        return y

    first = 6 * SEGMENT - REACH[name]
    for place, seen in ((first, True), (first - 1, False)):
        changed = x.clone()
        changed[:, place] = 5.0
        assert torch.equal(last(x), last(changed)) != seen


def test_no_gradient_crosses_a_segment():
    model, pages = build("transformer-xl", 0), twice(64, 1)
    table = model.embeddings.tokens
    seen = []
    hook = table.register_forward_hook(lambda module, args, output: (output.retain_grad(), seen.append(output))[0])
    read(model, pages, SEGMENT)[0][:, 2 * SEGMENT : 3 * SEGMENT].sum().backward()
    hook.remove()
    assert seen[2].grad.abs().sum() > 0
    assert all(output.grad is None or not output.grad.any() for output in (seen[0], seen[1]))


def test_parameters_are_equal_up_to_what_the_mixers_bring():
    counts = {name: printed_twice.parameters(build(name, 0)) for name in REACH}
    assert len({counts[name]["all"] for name in ("softmax", "window-32", "linear")}) == 1
    assert all(counts[name]["compression"] == 0 for name in REACH if not name.startswith("compressive"))
    language = {name: count["all"] - count["compression"] for name, count in counts.items()}
    assert max(language.values()) < 1.09 * min(language.values())
    assert len({language[name] for name in RECURRENT}) == 1


def test_a_model_of_another_name_is_refused():
    with pytest.raises(ValueError, match="model must be one of softmax.*'lstm'"):
        printed_twice.build("lstm", 0)


def test_the_furthest_lag_is_the_last_at_which_every_place_to_copy_from_is_in_reach():
    last = (PAGE - PASSAGE) // SEGMENT * SEGMENT  # where the segment of the second copy begins
    for name in REACH:
        lag = printed_twice.furthest_lag(name)
        for place in range(PAGE - PASSAGE + printed_twice.KNOWN, PAGE):
            start = last if name in RECURRENT else place - 1
            if name not in ("softmax", "linear"):
                assert place - lag >= start - REACH[name]
        if name not in ("softmax", "linear"):
            place = PAGE - 1 if name == "window-32" else PAGE - PASSAGE + printed_twice.KNOWN
            assert place - (lag + 1) < (last if name in RECURRENT else place - 1) - REACH[name]


# --------------------------------------------------------------------------------------------- a small run


def test_a_small_run_has_all_numbers_and_repeats_with_its_seed(monkeypatch):
    monkeypatch.setattr(printed_twice, "LAGS", (24, 160))
    first, again = (printed_twice.run({"model": "compressive-4", **SMALL}, 5).numbers for _ in range(2))
    assert first == again
    assert set(first["second"]) == {"24", "160"}
    assert all(len(losses) == PASSAGE for copy in ("first", "second") for losses in first[copy].values())


def test_loss_by_context_is_that_of_the_last_characters_alone():
    model = build("softmax", 0).eval()
    with torch.inference_mode():
        losses = printed_twice.by_context(model, 2)
    text = shakespeare.encode(shakespeare.load_text("dev"))
    starts = torch.randint(len(text) - 128, (2, 1), generator=torch.Generator().manual_seed(1))[:, 0].tolist()
    for context, loss in zip(printed_twice.CONTEXTS, losses, strict=True):
        wanted = [
            F.cross_entropy(model(text[None, s + 128 - context : s + 128]).logits[0, -1], text[s + 128]).item()
            for s in starts
        ]
        assert loss == pytest.approx(sum(wanted) / 2, abs=1e-5)


# ------------------------------------------------------------------------------------- what is recorded


def test_reading_a_summary():
    """Two seeds; the first eight characters of a copy do not count."""
    setting = {"model": "linear", "pages": "repeats"}
    runs = [
        {"setting": setting, "second": {str(lag): [9.0] * 8 + [level] * (PASSAGE - 8) for lag in LAGS}}
        for level in (1.0, 3.0)
    ]
    found = printed_twice.by_lag({"runs": runs}, "linear")
    assert found == {lag: [1.0, 3.0] for lag in LAGS}
    assert printed_twice.by_position({"runs": runs}, "linear", 48) == [9.0] * 8 + [2.0] * (PASSAGE - 8)
    with pytest.raises(ValueError, match="no run of model 'linear' on 'plain' pages"):
        printed_twice.runs_of({"runs": runs}, "linear", "plain")


def test_recorded_settings_are_those_of_the_study():
    study = printed_twice.STUDY
    recorded = [(run["setting"], run["seed"]) for run in load_results(study.name)["runs"]]
    assert recorded == [(setting, seed) for setting in study.recorded for seed in study.seeds]
    for run in load_results(study.name)["runs"]:
        assert run["parameters"] == printed_twice.parameters(build(run["setting"]["model"], 0))


def gains():
    """{model: {lag: the least and the most that a seed gains on the second copy, nats per character}}."""
    summary = load_results("printed_twice")
    found = {}
    for name in REACH:
        first, second = (printed_twice.by_lag(summary, name, copy) for copy in ("first", "second"))
        both = {lag: [a - b for a, b in zip(first[lag], second[lag], strict=True)] for lag in LAGS}
        found[name] = {lag: (min(gain), max(gain)) for lag, gain in both.items()}
    return found


def test_recorded_softmax_window_and_transformer_xl_copy_as_far_as_they_reach_and_no_further():
    found = gains()
    assert all(low > 1.9 for low, _ in found["softmax"].values())
    for lag in LAGS:
        low, high = found["transformer-xl"][lag]
        assert low > 1.7 if lag <= printed_twice.furthest_lag("transformer-xl") else high < 0.07
        low, high = found["window-32"][lag]
        assert low > 0.7 if lag <= printed_twice.furthest_lag("window-32") else high < 0.07


def test_recorded_linear_attention_does_not_copy_at_any_lag():
    assert all(low > 0 and high < 0.2 for low, high in gains()["linear"].values())


def test_recorded_slots_remember_less_the_more_they_hold():
    """Beyond the plain memory: a part at rate 2, as far as the slots reach, and little at rate 4."""
    found = gains()
    for lag in (64, 80, 96):
        assert found["compressive-2"][lag][0] > 0.4 and found["compressive-2"][lag][1] < 0.9
        assert found["compressive-4"][lag][0] > 0.05 and found["compressive-4"][lag][1] < 0.3
    for lag in (24, 32, 48):
        assert min(found["compressive-2"][lag][0], found["compressive-4"][lag][0]) > 1.4
    second = [printed_twice.by_lag(load_results("printed_twice"), f"compressive-{rate}") for rate in (2, 4)]
    for lag in (128, 160):  # here only rate 4 reaches
        assert mean(second[1][lag]) < mean(second[0][lag]) - 0.1
    assert found["transformer-xl"][80][0] > found["compressive-2"][80][1] + 1  # with as many slots, not compressed


def test_recorded_plain_loss_hardly_falls_beyond_sixteen_characters():
    for run in printed_twice.runs_of(load_results("printed_twice"), "softmax", "plain"):
        losses = dict(zip(printed_twice.CONTEXTS, run["context"], strict=True))
        assert losses[1] - losses[16] > 0.7 and losses[16] - losses[128] < 0.15
