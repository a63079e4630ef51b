"""Exercise 6 of notebook 08: how often a block of keys stands in the list of a block of queries.

BigBird (Zaheer et al. 2020, arXiv 2007.14062, sec. 2): global, window and random blocks, for one head.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from effnlp_lessons.attention.bigbird import random_plan
from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def bigbird_multiplicity(blocks: int, plan: Int[Tensor, "blocks random_blocks"]) -> Int[Tensor, "blocks blocks"]:
    """How often key block j stands in the list of query block i, for one head.

    The first and the last query block see every block once. The others list the first, the last, their own and
    their neighbours once each, however many of these coincide, and every block of their row of `plan` once more;
    -1 is no block.
    """
    query, key = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    sees_all = (query == 0) | (query == blocks - 1)
    fixed = sees_all | (key == 0) | (key == blocks - 1) | ((query - key).abs() <= 1)
    drawn = (plan[:, :, None] == key).sum(dim=1)
    return fixed + drawn.masked_fill(sees_all, 0)


Counts = Callable[[Tensor, Tensor, int], Tensor]  # of (query, key, blocks): how often a fixed block is listed


def _fixed(query: Tensor, key: Tensor, blocks: int) -> Tensor:
    return ((key == 0) | (key == blocks - 1) | ((query - key).abs() <= 1)).long()


def _exchange(
    fixed: Counts = _fixed,
    drawn: Callable[[Tensor, int], Tensor] = lambda plan, blocks: plan,
    join: Callable[[Tensor, Tensor], Tensor] = torch.add,
    ends: str = "see all",
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        fixed: how often a middle query block lists each block, without the plan.
        drawn: the plan that is counted, from (plan, blocks).
        join: the two counts of a middle query block, fixed and drawn, put together.
        ends: the first and last query block "see all", see all "and the plan", or are "like the others".
    """

    def answer(blocks: int, plan: Tensor) -> Tensor:
        query, key = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
        from_plan = (drawn(plan, blocks)[:, :, None] == key).sum(dim=1)
        count = join(fixed(query, key, blocks), from_plan)
        for end in {0, blocks - 1}:
            if ends == "see all":
                count[end] = 1
            if ends == "and the plan":
                count[end] = 1 + from_plan[end]
        return count

    return answer


def _draw(smallest: int, largest: int) -> Callable[[Generator], tuple]:
    """A plan with anything in it: blocks listed twice, fixed ones, none, and entries for the first and last row."""

    def draw(generator: Generator) -> tuple:
        blocks, random_blocks = whole_number(smallest, largest, generator), whole_number(2, 4, generator)
        return blocks, torch.randint(-1, blocks, (blocks, random_blocks), generator=generator)

    return draw


def _by_hand(generator: Generator) -> tuple:
    return 6, torch.tensor([[-1, -1], [3, 3], [-1, 5], [1, -1], [1, 1], [-1, -1]])


def _empty(generator: Generator) -> tuple:
    blocks = whole_number(4, 7, generator)
    return blocks, torch.full((blocks, whole_number(1, 3, generator)), -1)


def _as_the_library_draws(generator: Generator) -> tuple:
    blocks = whole_number(6, 9, generator)
    return blocks, random_plan(1, blocks, whole_number(1, 3, generator), seed=whole_number(0, 999, generator))[0]


BIGBIRD_MULTIPLICITY = Exercise(
    id="patterns.bigbird_multiplicity",
    title="a list, not a set",
    minutes=10,
    difficulty=2,
    reference=bigbird_multiplicity,
    properties=(
        Property("by hand: 6 blocks, two random ones each", _by_hand, times=1),
        Property("a plan without any block: global blocks and window", _empty, times=1),
        Property("a plan as the library draws it: new blocks, each once", _as_the_library_draws, times=1),
        Property("any plan: a block can be listed again", _draw(5, 8), times=2),
        Property("one to three blocks", _draw(1, 3), times=2),
        Property("no random blocks: the plan has no columns", lambda generator: (5, torch.zeros(5, 0).long()), times=1),
    ),
    mistakes=(
        Mistake(
            "A set instead of a list",
            "You say whether a block is listed, 0 or 1. Every entry of the plan adds one, also to a block that "
            "is listed already.",
            _exchange(join=lambda fixed, drawn: (fixed + drawn).clamp(max=1)),
        ),
        Mistake(
            "Fixed blocks that coincide are counted twice",
            "Next to an end a neighbour is also the first or the last block. It is listed once: join the "
            "conditions with |, do not add them.",
            _exchange(
                lambda query, key, blocks: (
                    (key == 0).long() + (key == blocks - 1).long() + ((query - key).abs() <= 1).long()
                )
            ),
        ),
        Mistake(
            "The plan adds only blocks that are not fixed",
            "A plan may name a block of the window or a global one. It then stands in the list twice.",
            _exchange(join=lambda fixed, drawn: torch.where(fixed > 0, fixed, drawn)),
        ),
        Mistake(
            "A block that the plan lists twice counts once",
            "Every entry of a row adds one, also the second that names the same block.",
            _exchange(join=lambda fixed, drawn: fixed + drawn.clamp(max=1)),
        ),
        Mistake(
            "The plan is used as an index",
            "count[i, plan[i]] += 1 adds one only once to a block that comes up twice, and -1 is the last block "
            "to it. Compare the entries with the numbers of the blocks, and sum.",
            _exchange(drawn=lambda plan, blocks: plan % blocks, join=lambda fixed, drawn: fixed + drawn.clamp(max=1)),
        ),
        Mistake(
            "-1 is taken for the last block",
            "As an index -1 means the last, without any error. Here it means: no block.",
            _exchange(drawn=lambda plan, blocks: plan % blocks),
        ),
        Mistake(
            "-1 is taken for block 0",
            "Clipping -1 to 0 makes it a usable index, and block 0 is then listed again. Here -1 means: no block.",
            _exchange(drawn=lambda plan, blocks: plan.clamp(min=0)),
        ),
        Mistake(
            "The plan counts for the first and last query block",
            "These two see every block once. Whatever the plan has in their rows is ignored.",
            _exchange(ends="and the plan"),
        ),
        Mistake(
            "The first and last query block are like the others",
            "Global goes both ways: these two blocks are seen by all, and they see all.",
            _exchange(ends="like the others"),
        ),
        Mistake(
            "The first and last key block are not seen by all",
            "Global goes both ways: these two blocks see all, and all see them.",
            _exchange(lambda query, key, blocks: ((query - key).abs() <= 1).long()),
        ),
        Mistake(
            "The neighbours are left out",
            "The window of a block is its own block, the one before and the one behind.",
            _exchange(lambda query, key, blocks: ((key == 0) | (key == blocks - 1) | (query == key)).long()),
        ),
        Mistake(
            "The own block is left out",
            "The window of a block is its own block, the one before and the one behind.",
            _exchange(
                lambda query, key, blocks: ((key == 0) | (key == blocks - 1) | ((query - key).abs() == 1)).long()
            ),
        ),
        Mistake(
            "Rows and columns are exchanged",
            "Rows are query blocks, columns are key blocks. Row i of the plan belongs to query block i.",
            lambda blocks, plan: bigbird_multiplicity(blocks, plan).T,
        ),
    ),
    hints=(
        "Two tables: one of the fixed blocks, where only True or False matters, and one that counts the plan. "
        "Which rows of the sum are special?",
        "With | a block that is fixed for two reasons stays a single True. For the plan compare each of its "
        "entries with each number of a block, then sum over the entries: -1 equals none of them. A bool table "
        "plus a table of whole numbers is a table of whole numbers.",
        "A neighbour: three voters have two votes each, and may give both to one of four people; -1 is a vote "
        "not given. How many votes has each person from each voter?\n"
        "  votes = torch.tensor([[2, 2], [0, -1], [3, 1]])\n"
        "  person = torch.arange(4)\n"
        "  votes[:, :, None] == person                      (voters, votes, people), bool\n"
        "  (votes[:, :, None] == person).sum(dim=1)         [[0, 0, 2, 0], [1, 0, 0, 0], [0, 1, 0, 1]]\n"
        "Voter 1 is ill, so nothing of theirs counts: .masked_fill(torch.tensor([[False], [True], [False]]), 0)",
    ),
)
