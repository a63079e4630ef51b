"""ListOps: values against a stack machine that reads tokens, the generator's rules counted, what is kept."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from effnlp_lessons.datasets import listops
from effnlp_lessons.datasets.listops import ListOps, draw_tree, evaluate, make_listops, to_text, token_ids

MEANING = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(np.median(values)),  # as the benchmark's generator has it
    "[SM": lambda values: sum(values) % 10,
}


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(text: str) -> int:
    """The value of a text, by a stack: a closing bracket takes off everything down to the last operator."""
    stack = []
    for token in text.split():
        if token != "]":
            stack.append(int(token) if token.isdigit() else token)
            continue
        values = []
        while isinstance(stack[-1], int):
            values.append(stack.pop())
        stack.append(int(MEANING[stack.pop()](values)))
    [value] = stack
    return value


def nodes(tree, depth: int = 1):
    """Every node with its depth."""
    yield tree, depth
    for argument in tree[1:] if isinstance(tree, tuple) else ():
        yield from nodes(argument, depth + 1)


def check_share(count: int, total: int, probability: float) -> None:
    """The count of a binomial draw is within four standard deviations; the seeds are fixed."""
    assert abs(count - total * probability) < 4 * math.sqrt(total * probability * (1 - probability)), count / total


@pytest.fixture(scope="module")
def trees() -> list:
    uniform = listops.uniform_numbers(draw())
    return [draw_tree(uniform) for _ in range(2_000)]


@pytest.fixture(scope="module")
def short() -> ListOps:
    return make_listops(2_000, draw(), min_length=20, max_length=120)


# ------------------------------------------------------------------------------------------- what trees mean


def test_values_written_out():
    tree = ("MAX", 4, ("MED", 2, 7), ("SM", 9, 3), 0)
    assert to_text(token_ids(tree)) == "[MAX 4 [MED 2 7 ] [SM 9 3 ] 0 ]"
    assert token_ids(tree) == [11, 4, 12, 2, 7, 14, 13, 9, 3, 14, 0, 14]
    assert [evaluate(part) for part in tree[1:]] == [4, 4, 2, 0] and evaluate(tree) == 4
    assert evaluate(("MIN", 5, 3, 8)) == 3
    assert evaluate(("MED", 9, 1, 4)) == 4 and evaluate(("MED", 8, 1, 4, 5)) == 4  # 4.5 without its fraction
    assert evaluate(("SM", 9, 9, 9)) == 7
    assert " ".join(listops.TOKENS) == "0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]"
    with pytest.raises(ValueError, match="operator must be one of MIN, MAX, MED, SM, got 'FIRST'"):
        evaluate(("FIRST", 1, 2))


def test_a_stack_machine_reads_the_same_values(trees):
    for tree, length in trees:
        ids = token_ids(tree)
        assert len(ids) == length
        assert read(to_text(ids)) == evaluate(tree)
    operators = Counter(node[0] for tree, _ in trees for node, _ in nodes(tree) if isinstance(node, tuple))
    assert min(operators[name] for name in listops.OPERATORS) > 1_000


# ----------------------------------------------------------------------------------------- the drawing rules


def test_nodes_are_drawn_by_the_rules(trees):
    every = [pair for tree, _ in trees for pair in nodes(tree)]
    assert max(depth for _, depth in every) == 10
    assert all(isinstance(node, int) for node, depth in every if depth == 10)
    above = [node for node, depth in every if depth < 10]
    inner = [node for node in above if isinstance(node, tuple)]
    check_share(len(inner), len(above), 0.25)
    arguments = Counter(len(node) - 1 for node in inner)
    assert sorted(arguments) == list(range(2, 11))
    for count in arguments.values():
        check_share(count, len(inner), 1 / 9)
    names = Counter(node[0] for node in inner)
    assert sorted(names) == sorted(listops.OPERATORS)
    for count in names.values():
        check_share(count, len(inner), 1 / 4)
    digits = Counter(node for node, _ in every if isinstance(node, int))
    assert sorted(digits) == list(range(10))
    for count in digits.values():
        check_share(count, digits.total(), 1 / 10)


def test_lengths_have_the_mean_that_the_rules_give():
    uniform = listops.uniform_numbers(draw(1))
    lengths = np.array([draw_tree(uniform, max_depth=5, max_args=4)[1] for _ in range(20_000)])
    mean = 1.0  # at the greatest depth; a level above, 3 in 4 are a digit and 1 in 4 has 3 arguments on average
    for _ in range(4):
        mean = 0.75 + 0.25 * (2 + 3 * mean)
    assert abs(lengths.mean() - mean) < 4 * lengths.std() / math.sqrt(len(lengths))
    assert all(isinstance(draw_tree(uniform, max_depth=1)[0], int) for _ in range(20))


def test_too_long_trees_are_given_up_and_the_others_are_what_they_were():
    """Cut at 60 tokens or not: the same distribution of lengths below 60."""
    uniform = listops.uniform_numbers(draw(2))
    whole = [draw_tree(uniform)[1] for _ in range(4_000)]
    cut = [draw_tree(uniform, max_length=60) for _ in range(4_000)]
    assert all((tree is None) == (length >= 60) for tree, length in cut)
    few = [draw_tree(uniform, max_length=9) for _ in range(1_000)]
    assert all((tree is None) == (length >= 9) for tree, length in few) and {8, 9} <= {length for _, length in few}
    assert max(length for _, length in cut) < 9 * 60 < max(whole)  # nine open operators, each still below 60 alone
    for low, high in ((1, 2), (2, 20), (20, 60)):
        first = sum(low <= length < high for length in whole)
        second = sum(low <= length < high for _, length in cut)
        share = (first + second) / 8_000
        assert abs(first - second) < 4 * math.sqrt(8_000 * share * (1 - share))


# ------------------------------------------------------------------------------------------------- what is kept


def test_rows_are_distinct_trees_of_the_lengths_asked_for(short):
    lengths = short.key_padding_mask.sum(dim=1)
    assert len(short) == 2_000 and lengths.min() == 21 and lengths.max() == 119 == short.token_ids.shape[1]
    rows = set()
    for ids, mask, label in zip(short.token_ids, short.key_padding_mask, short.labels, strict=True):
        assert mask[: mask.sum()].all() and (ids[~mask] == 0).all()
        text = to_text(ids[mask])
        rows.add(text)
        assert read(text) == label
    assert len(rows) == 2_000
    assert short.token_ids.dtype == short.labels.dtype == torch.int64
    assert short.token_ids.unique().tolist() == list(range(15))


def test_the_defaults_are_those_of_the_benchmark():
    data = make_listops(40, draw())
    lengths = data.key_padding_mask.sum(dim=1)
    assert lengths.min() > 500 and lengths.max() < 2_000
    # lengths from 500 to 2,000 have a deviation of less than 430 if short ones are more frequent: 4 x 430 / sqrt(40)
    # is 270, and the mean of many rows is 1,040
    assert 770 < lengths.double().mean() < 1_310
    for ids, mask, label in zip(data.token_ids, data.key_padding_mask, data.labels, strict=True):
        assert read(to_text(ids[mask])) == label
        opened = torch.where(ids == 14, -1, (ids >= 10).long())[mask].cumsum(dim=0)
        assert 1 <= opened.max() <= 9 and opened[-1] == 0


def test_one_answer_to_all_is_right_in_15_to_17_of_100():
    data = make_listops(3_000, draw(), min_length=50, max_length=200)
    error = math.sqrt(0.16 * 0.84 / len(data))  # standard error of a share
    assert 0.15 - 3 * error < data.majority_share < 0.17 + 3 * error
    shares = data.labels.bincount(minlength=10) / len(data)
    assert data.majority_share == pytest.approx(shares.max().item())
    assert sorted(shares.argsort()[-2:].tolist()) == [0, 9]
    assert (shares[1:9] < 0.12).all()


def test_the_generator_decides():
    one, same, other = (make_listops(30, draw(seed), min_length=10, max_length=50) for seed in (1, 1, 2))
    assert torch.equal(one.token_ids, same.token_ids) and torch.equal(one.labels, same.labels)
    assert one.token_ids.shape != other.token_ids.shape or not torch.equal(one.token_ids, other.token_ids)
    generator, state = draw(1), torch.get_rng_state()
    first, second = (make_listops(30, generator, min_length=10, max_length=50) for _ in range(2))
    assert torch.equal(first.labels, one.labels) and not torch.equal(first.labels, second.labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_splits_share_no_tree(short):
    parts = short.split(1_500, 300, 200)
    assert [len(part) for part in parts] == [1_500, 300, 200]
    for name in ("token_ids", "key_padding_mask", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(short, name))
    for rows in ((1_500, 300), (2_000, 0), (2_100, -100)):
        with pytest.raises(ValueError, match=rf"rows must be >= 1 and sum to 2000, got \({rows[0]}, {rows[1]}\)"):
            short.split(*rows)


def test_few_trees_are_all_found_and_no_more(monkeypatch):
    monkeypatch.setattr(listops, "PATIENCE", 5_000)
    data = make_listops(10, draw(), min_length=0, max_length=2)
    assert data.token_ids.shape == (10, 1) and sorted(data.labels.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="rows must be <= 10, got 11: no other tree in 5000 draws"):
        make_listops(11, draw(), min_length=0, max_length=2)


@pytest.mark.parametrize(
    ("name", "value", "smallest"),
    [("rows", 0, 1), ("min_length", -1, 0), ("max_length", 501, 502), ("max_depth", 0, 1), ("max_args", 1, 2)],
)
def test_numbers_that_are_too_small_are_refused(name, value, smallest):
    with pytest.raises(ValueError, match=f"{name} must be >= {smallest}, got {value}"):
        make_listops(**{"rows": 5, "generator": draw()} | {name: value})
