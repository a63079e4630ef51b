"""The course's task: examples, logits in the order given, accuracy counted by hand."""

import pytest
import torch

from effnlp_lessons.classification import ReviewExamples, accuracy, logits_of
from effnlp_lessons.datasets import reviews, tokenizer
from effnlp_lessons.pretrained import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


def test_logits_come_in_the_order_given(teacher):
    texts = [
        "Good.",
        "A very long and very dull film about a very long and very dull war.",
        "",
        "I liked it a lot.",
    ]
    one_by_one = torch.cat([logits_of(teacher, tokenizer.encode([text])) for text in texts])
    torch.testing.assert_close(logits_of(teacher, tokenizer.encode(texts), batch_size=3), one_by_one, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least one sentence"):
        logits_of(teacher, [])


def test_batches_hold_the_sentences_they_name():
    dev = reviews.load_reviews().subset("dev")
    examples = ReviewExamples(dev)
    token_ids, mask, labels = examples.batch([5, 700])
    expected, expected_mask = tokenizer.pad(tokenizer.encode([dev.text[5], dev.text[700]]))
    assert torch.equal(token_ids, expected) and torch.equal(mask, expected_mask)
    assert labels.tolist() == [dev.label[5], dev.label[700]]
    assert len(examples.lengths) == len(dev) and examples.lengths[700] == mask[1].sum()


def test_limit_takes_the_same_random_sample_each_time():
    dev = reviews.load_reviews().subset("dev")
    one, two = ReviewExamples(dev, limit=60), ReviewExamples(dev, limit=60)
    assert one.token_ids == two.token_ids and len(one.lengths) == 60
    assert one.token_ids != ReviewExamples(dev).token_ids[:60]
    assert 10 < one.labels.sum() < 50  # both labels: the file begins with one of them


def test_accuracy_is_the_share_of_right_labels():
    examples = ReviewExamples(reviews.load_reviews().subset("dev"), limit=64)

    def always_positive(token_ids, key_padding_mask):
        return torch.tensor([[0.0, 1.0]]).expand(len(token_ids), 2)

    assert accuracy(always_positive, examples) == pytest.approx(100 * examples.labels.double().mean().item())
