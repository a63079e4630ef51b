"""The study of the bit budget: a small run against whole quantized models, and the recorded summary."""

import pytest
import torch

from effnlp_lessons.classification import ReviewExamples, logits_of
from effnlp_lessons.datasets import reviews, tokenizer
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization.post_training import quantize_linears
from effnlp_lessons.quantization.qbert import layer_sensitivities, sensitivity
from effnlp_lessons.studies import bit_budget
from effnlp_lessons.studies.runner import load_results

SMALL = {"subsets": 2, "sentences": 3, "tokens": 7, "iterations": 1, "limit": 6}


@pytest.fixture(scope="module")
def outcome():
    return bit_budget.run(SMALL, seed=5).numbers


def test_choices_and_their_names():
    assert len(bit_budget.CHOICES) == 64 and len(bit_budget.EQUAL_SIZE) == 20
    assert all(sum(bits) == 15 for bits in bit_budget.EQUAL_SIZE)
    assert bit_budget.name((2, 3, 2, 2, 3, 3)) == "232233" and bit_budget.bits_of("232233") == (2, 3, 2, 2, 3, 3)
    sizes = {bit_budget.size_of(bits) for bits in bit_budget.EQUAL_SIZE}
    # six matrices of 4 x 384 x 384 and 2 x 384 x 1536 numbers at 2.5 bits on average, a float32 scale and a zero
    # point of as many bits for each 64 of them; 4 x 384 + 1536 + 384 biases and 4 x 384 numbers of norms, float32
    numbers = 6 * (4 * 384 * 384 + 2 * 384 * 1_536)
    vectors = 6 * (5 * 384 + 1_536 + 4 * 384)
    assert sizes == {int(numbers * 2.5 / 8 + numbers / 64 * (4 + 2.5 / 8) + 4 * vectors)} == {4_152_960}


def right(model, ids, labels):
    return int((logits_of(model, ids).argmax(-1) == labels).sum())


def test_shared_layers_give_what_whole_models_give():
    teacher, examples = load_teacher(), ReviewExamples(reviews.load_reviews().subset("dev"), limit=40)
    ids, labels = examples.token_ids, examples.labels
    quantized = {k: list(quantize_linears(teacher, k, 64, symmetric=False).encoder.blocks) for k in (2, 3)}
    choices = [bit_budget.bits_of(word) for word in ("222222", "232322", "233322", "333333")]
    found = bit_budget.right_by_choice(teacher, quantized, ids, labels, choices, batch=16)
    assert len(set(found.values())) == 4
    for bits in choices:
        whole = quantize_linears(teacher, dict(enumerate(bits)), 64, symmetric=False)
        assert found[bit_budget.name(bits)] == right(whole, ids, labels)


def test_a_seed_measures_its_part_of_the_sentences(outcome):
    """Seed 5 the second of the four."""
    teacher = load_teacher()
    whole = quantize_linears(teacher, 3, 64, symmetric=False)
    for split in ("test", "dev"):
        examples = ReviewExamples(reviews.load_reviews().subset(split))
        rows = list(range(1, len(examples.token_ids), 4))[:6]
        ids, labels = [examples.token_ids[row] for row in rows], examples.labels[rows]
        assert outcome["right"][split]["333333"] == right(whole, ids, labels)
        assert outcome["float"][split] == right(teacher, ids, labels)
        assert outcome["sentences"][split] == 6 and len(outcome["right"][split]) == 64


def test_curvature_is_that_of_the_seeds_subsets(outcome):
    subsets = bit_budget.hessian_subsets(2, 3, 7, seed=5)
    found = layer_sensitivities(load_teacher(), subsets, iterations=1, seed=5)
    expected = torch.tensor(outcome["eigenvalues"], dtype=torch.float64)
    torch.testing.assert_close(found.eigenvalues, expected, atol=5e-5, rtol=0)  # kept to four digits
    torch.testing.assert_close(found.omega, torch.tensor(outcome["omega"], dtype=torch.float64), atol=5e-5, rtol=0)


def test_no_sentence_is_in_two_subsets():
    subsets = bit_budget.hessian_subsets(3, 40, 20, seed=1)
    assert [[len(labels) for _, _, labels in subset] for subset in subsets] == [[32, 8]] * 3
    train = ReviewExamples(reviews.load_reviews().subset("train"))
    order = torch.randperm(len(train.lengths), generator=torch.Generator().manual_seed(1)).tolist()
    for number, subset in enumerate(subsets):
        rows = sorted(order[40 * number : 40 * (number + 1)], key=lambda row: train.lengths[row])
        expected = [train.token_ids[row] for row in rows]
        found = [ids[real].tolist() for batch, mask, _ in subset for ids, real in zip(batch, mask, strict=True)]
        assert torch.equal(torch.cat([labels for _, _, labels in subset]), train.labels[rows])
        for own, whole in zip(found, expected, strict=True):
            assert own == (whole if len(whole) <= 20 else [*whole[:19], tokenizer.SEP])
    assert sum(len(ids) > 20 for ids in expected) > 5
    with pytest.raises(ValueError, match=r"100 subsets of 100 need more than the \d+ training sentences"):
        bit_budget.hessian_subsets(100, 100, 20, seed=1)


def test_the_hessians_choice_and_places():
    omega = [3.0, 9.0, 1.0, 7.0, 8.0, 2.0]
    assert bit_budget.hessian_choice(omega) == (2, 3, 2, 3, 3, 2)
    assert bit_budget.hessian_choice(omega, reverse=True) == (3, 2, 3, 2, 2, 3)
    accuracy = {bits: float(place // 2) for place, bits in enumerate(bit_budget.CHOICES)}
    places = [bit_budget.rank(bits, accuracy) for bits in bit_budget.EQUAL_SIZE]
    assert sorted(places)[0] == 1 and max(places) <= 20
    best = max(bit_budget.EQUAL_SIZE, key=accuracy.get)
    assert bit_budget.rank(best, accuracy) == 1
    assert bit_budget.standard_error(80.0, 2_000) == pytest.approx(0.894, abs=0.001)


# ------------------------------------------------------------------------------------------- as recorded


@pytest.fixture(scope="module")
def summary():
    return load_results("bit_budget")


def test_every_sentence_is_measured_once_by_every_choice(summary):
    runs = summary["runs"]
    assert len({run["seed"] for run in runs}) == len(runs) == len(bit_budget.SEEDS) >= 3
    assert sum(run["sentences"]["test"] for run in runs) == 2_000
    assert sum(run["sentences"]["dev"] for run in runs) == 1_000
    for run in runs:
        for split in ("test", "dev"):
            assert set(run["right"][split]) == {bit_budget.name(bits) for bits in bit_budget.CHOICES}
        eigenvalues = torch.tensor(run["eigenvalues"], dtype=torch.float64)
        assert eigenvalues.shape == (6, 10)
        # kept to four digits
        assert run["omega"] == pytest.approx(sensitivity(eigenvalues).tolist(), abs=2e-4)
    accuracy = bit_budget.accuracies(summary)
    assert set(accuracy) == set(bit_budget.CHOICES)
    right = sum(run["right"]["test"]["232323"] for run in runs)
    assert accuracy[2, 3, 2, 3, 2, 3] == pytest.approx(right / 20)
    pooled = torch.cat([torch.tensor(run["eigenvalues"], dtype=torch.float64) for run in runs], dim=1)
    assert bit_budget.pooled_omega(summary) == pytest.approx(sensitivity(pooled).tolist())
    assert bit_budget.omegas(summary) == [run["omega"] for run in runs]


def test_what_is_said_of_the_hessians_choice_holds(summary):
    """The same choice on every seed; better than the mean, not the best; its reverse below the mean."""
    pooled = bit_budget.pooled_omega(summary)
    for omega in (*bit_budget.omegas(summary), pooled):
        assert bit_budget.hessian_choice(omega) == (3, 3, 3, 2, 2, 2)
        assert bit_budget.hessian_choice(omega, reverse=True) == (2, 2, 2, 3, 3, 3)
        assert omega[2:] == sorted(omega[2:], reverse=True) and min(omega[:2]) > omega[2]
    assert {omega[0] > omega[1] for omega in bit_budget.omegas(summary)} == {True, False}  # 1 and 2 are a tie
    for split in ("test", "dev"):
        accuracy = bit_budget.accuracies(summary, split)
        mean = sum(accuracy[bits] for bits in bit_budget.EQUAL_SIZE) / 20
        assert accuracy[2, 2, 2, 3, 3, 3] < mean < accuracy[3, 3, 3, 2, 2, 2]
        assert bit_budget.rank((3, 3, 3, 2, 2, 2), accuracy) == 4
        assert bit_budget.rank((2, 3, 3, 3, 2, 2), accuracy) == 1  # layer 4 in the place of layer 1
        # alone at 3 bits, layer 1 brings the least, though its curvature is as large as any
        gains = [accuracy[tuple(2 + (m == layer) for m in range(6))] - accuracy[(2,) * 6] for layer in range(6)]
        assert min(range(6), key=gains.__getitem__) == 0


def test_where_the_iteration_has_settled(summary):
    """The residual bounds the distance to an eigenvalue: small in the upper layers, not always in the lower ones."""
    shares = [
        [abs(r / v) for run in summary["runs"] for r, v in zip(run["residuals"][m], run["eigenvalues"][m], strict=True)]
        for m in range(6)
    ]
    assert [sum(share > 0.1 for share in row) for row in shares] == [7, 2, 2, 0, 0, 0]
    assert summary["runs"][0]["eigenvalues"][0][3] == pytest.approx(-10.1, abs=0.05)
