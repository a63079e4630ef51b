"""Printed twice: which attention still knows a passage when it comes again? Six small models, the same characters.

A page of Shakespeare on which one passage stands twice, `lag` characters apart. What is new in the first copy is
known in the second, to a model that can still look at the first one: the loss there, in nats per character, measures
memory. Copying by content means to find the place where the last characters stood before, and to take what came
next there. The six models, of two layers; the memories of the last three have 64 slots each:

    softmax           every earlier character
    window-32         32 characters to the left, by `longformer.window_attention`
    linear            the running sums of `linear.LinearSelfAttention`, of a fixed size
    transformer-xl    segments of 32 and a memory of 64 characters: reaches 64 characters before its segment
    compressive-2     32 characters and 32 slots for 2 each: 96 characters before its segment, with 64 slots
    compressive-4     32 characters and 32 slots for 4 each: 160 characters before its segment, with 64 slots

All are trained on the same pages (text in which most passages come again at a random lag, and a quarter of the pages
of random characters, where only copying helps) and on as many steps. The recurrent models read a page segment by
segment with their states; the gradients stop at the segment.

NOTE in all six, each layer's mixer sees a character together with the three before it (`WithPredecessors`, a learned
linear map); without it two layers are the least that can copy. A trial of softmax attention without it, with learned
absolute positions, did not begin to copy in the time of this study. Softmax, window and
linear attention have no other positions, Transformer-XL and the compressive models their relative ones.
NOTE equal parameters up to what a mixer brings: W_R of the relative positions, and the compression, which is trained
by its own loss. `parameters` counts them. The weights start three times larger than BERT's 0.02.
NOTE a layer's memory holds what the layer below read, so two layers reach further than one. To copy by content, the
upper layer must see the place itself: its reach counts. A relay over two layers would have to be learned.
NOTE the steps are few and the learning rate is one for all: nobody copies without error, and longer training might
find a relay or a better use of the slots. That the compression learns nothing from the language model is the paper's.
NOTE plain character loss cannot show memory: `context` gives the loss of the next character after the last c
characters alone, for softmax attention trained on plain pages too.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnlp_lessons.attention.compressive import CompressiveAttention, CompressiveState
from effnlp_lessons.attention.linear import LinearSelfAttention
from effnlp_lessons.attention.longformer import window_attention
from effnlp_lessons.attention.transformer_xl import TransformerXLAttention
from effnlp_lessons.datasets import shakespeare
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import Decoder, SelfAttention, TransformerConfig

PAGE, PASSAGE, SEGMENT, WINDOW = 192, 24, 32, 32  # characters
SLOTS = 64  # of Transformer-XL's memory, and of the compressive memories, half of them compressed
LAGS = (24, 32, 48, 64, 80, 96, 128, 160)
CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128)
KNOWN = 8  # characters of the second copy until a reader can know which passage it is
PREDECESSORS = 3
REACH = {  # characters that a layer sees before its segment, or before the character itself
    "softmax": PAGE,
    "window-32": WINDOW,
    "linear": PAGE,
    "transformer-xl": SLOTS,
    "compressive-2": SLOTS // 2 + SLOTS // 2 * 2,
    "compressive-4": SLOTS // 2 + SLOTS // 2 * 4,
}
RECURRENT = ("transformer-xl", "compressive-2", "compressive-4")

# --------------------------------------------------------------------------------------------- the models


class WithPredecessors(nn.Module):
    """A token mixer that gets x_i + W [x_{i-3}; x_{i-2}; x_{i-1}] in place of x_i; zeros before the text.

    The state is (the last three x, the mixer's own state), or None for a mixer that keeps none.
    """

    def __init__(self, config: TransformerConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.predecessors = nn.Linear(PREDECESSORS * config.d_model, config.d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "batch length d_model"], key_padding_mask: Tensor | None = None, state: Any = None
    ) -> tuple[Float[Tensor, "batch length d_model"], Any]:
        before, own = (x.new_zeros(x.shape[0], PREDECESSORS, x.shape[2]), None) if state is None else state
        rows, length = torch.cat([before, x], dim=1), x.shape[1]
        around = torch.cat([rows[:, shift : shift + length] for shift in range(PREDECESSORS)], dim=-1)
        y, own = self.mixer(x + self.predecessors(around), key_padding_mask, own)
        return y, None if own is None else (rows[:, -PREDECESSORS:].detach(), own)


def token_mixer(name: str, config: TransformerConfig) -> nn.Module:
    """The token mixer of one of the six models."""
    half = SLOTS // 2
    if name == "softmax":
        return SelfAttention(config, causal=True)
    if name == "window-32":
        return SelfAttention(config, causal=True, attention=partial(window_attention, window=WINDOW, causal=True))
    if name == "linear":
        return LinearSelfAttention(config, causal=True)
    if name == "transformer-xl":
        return TransformerXLAttention(config, SLOTS)
    if name in ("compressive-2", "compressive-4"):
        return CompressiveAttention(config, half, half, rate=int(name[-1]))
    raise ValueError(f"model must be one of {', '.join(REACH)}, got {name!r}")


def build(name: str, seed: int) -> Decoder:
    """A decoder of two layers, 96 channels and 4 heads, without a table of positions."""
    config = TransformerConfig(
        vocab_size=len(shakespeare.vocabulary()), max_length=0, d_model=96, layers=2, heads=4, d_ff=192, segments=0,
        pooler=False, norm_first=True, norm_eps=1e-5, dropout=0.0,
    )  # fmt: skip
    mixer = lambda config, layer: WithPredecessors(config, token_mixer(name, config))  # noqa: E731
    model = Decoder(config, token_mixer=mixer, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def parameters(model: Decoder) -> dict[str, int]:
    """How many parameters: "all", and those of the "compression" among them, which the language loss does not train."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {"all": sum(counts.values()), "compression": sum(n for name, n in counts.items() if "compression" in name)}


def read(
    model: Decoder, pages: Int[Tensor, "batch length"], segment: int | None = None
) -> tuple[Float[Tensor, "batch length-1"], Float[Tensor, ""]]:
    """Loss (nats) of every character but the first, and the sum of the layers' reconstruction losses over segments.

    With `segment`, the page is read in pieces of so many characters, each with the state that the last one left.
    """
    given, wanted = pages[:, :-1], pages[:, 1:]
    losses, rebuilt, state = [], torch.zeros(()), None
    for piece, target in zip(given.split(segment or PAGE, 1), wanted.split(segment or PAGE, 1), strict=True):
        logits, state = model(piece, state=state)
        losses.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none"))
        own = [layer[1] for layer in state.layers if layer is not None]
        rebuilt = rebuilt + sum(layer.reconstruction_loss for layer in own if isinstance(layer, CompressiveState))
    return torch.cat(losses, dim=1), rebuilt


# ---------------------------------------------------------------------------------------------- the pages


@cache
def characters(split: str) -> Int[Tensor, " length"]:
    return shakespeare.encode(shakespeare.load_text(split))


class Pages:
    """Pages to train on. Page i depends on the seed and on i alone.

    kind "repeats": new text of 0 to 23 characters, then 24 that stood on the page before, at a random lag from 24
    on; and so on. Every fourth page has random characters in place of text. kind "plain": just text.
    """

    def __init__(self, count: int, kind: str, seed: int) -> None:
        self.lengths, self.kind, self.seed = [PAGE] * count, kind, seed

    def page(self, index: int) -> Int[Tensor, " length"]:
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + index)

        def random(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        text = characters("train")
        start = random(0, len(text) - PAGE)
        page = text[start : start + PAGE].clone()
        if self.kind == "plain":
            return page
        if index % 4 == 0:
            page = torch.randint(len(shakespeare.vocabulary()), (PAGE,), generator=generator)
        place = PASSAGE + random(0, PASSAGE)
        while place + PASSAGE <= PAGE:
            lag = random(PASSAGE, place + 1)
            page[place : place + PASSAGE] = page[place - lag : place - lag + PASSAGE].clone()
            place += PASSAGE + random(0, PASSAGE)
        return page

    def batch(self, indices: list[int]) -> Int[Tensor, "batch length"]:
        return torch.stack([self.page(index) for index in indices])


def twice(lag: int, count: int, seed: int = 0) -> Int[Tensor, "count length"]:
    """Pages that end with a passage that also stands `lag` characters before, all from the development plays.

    The passages and the other text are the same for every lag.

    Raises:
        ValueError: a lag at which the copies overlap or the first one does not fit on the page.
    """
    if not PASSAGE <= lag <= PAGE - PASSAGE:
        raise ValueError(f"lag must be in {PASSAGE} .. {PAGE - PASSAGE}, got {lag}")
    text, generator = characters("dev"), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - PAGE, (2, count, 1), generator=generator)
    pages, passages = text[starts[0] + torch.arange(PAGE)], text[starts[1] + torch.arange(PASSAGE)]
    second = PAGE - PASSAGE
    pages[:, second:] = passages
    pages[:, second - lag : PAGE - lag] = passages
    return pages


def furthest_lag(model: str) -> int:
    """The largest lag at which one layer still sees the first copy of every character that comes after the known ones.

    The second copy begins 8 characters after its segment, so the recurrent models see 16 characters more at best.
    """
    if model == "window-32":
        return WINDOW + 1  # a character is copied from the place after the one that matches
    return REACH[model] + ((PAGE - PASSAGE + KNOWN) % SEGMENT if model in RECURRENT else 0)


# ------------------------------------------------------------------------------------------------ the study


def copies(
    losses: Float[Tensor, "pages length-1"], lag: int
) -> tuple[Float[Tensor, " passage"], Float[Tensor, " passage"]]:
    """Mean loss of each character of the first and of the second copy, from the losses of pages `twice(lag, ...)`."""
    mean = F.pad(losses.mean(0), (1, 0), value=float("nan"))  # the first character of a page has no loss
    return mean[PAGE - PASSAGE - lag : PAGE - lag], mean[PAGE - PASSAGE :]


def by_context(model: Decoder, count: int) -> list[float]:
    """Loss (nats) of the same characters after the last c of `CONTEXTS` characters alone, one for each c."""
    text, longest = characters("dev"), max(CONTEXTS)
    starts = torch.randint(len(text) - longest, (count, 1), generator=torch.Generator().manual_seed(1))
    pages = text[starts + torch.arange(longest + 1)]
    losses = []
    for context in CONTEXTS:
        parts = [model(part[:, -1 - context : -1]).logits[:, -1] for part in pages.split(128)]
        losses.append(F.cross_entropy(torch.cat(parts), pages[:, -1]).item())
    return losses


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Train one model and read pages with a passage printed twice.

    `setting`: model (of `REACH`), pages ("repeats" or "plain"), steps, batch, rate (the peak learning rate), passages
    (how many to measure on).

    Numbers: "parameters"; "first" and "second", `{lag: loss of each character of that copy}`, means over passages;
    "plain", the loss on development text where nothing comes again, in the second half of a page; for softmax also
    "context", one loss for each of `CONTEXTS`. All losses in nats per character.
    """
    name, count = setting["model"], setting["passages"]
    segment = SEGMENT if name in RECURRENT else None
    model = build(name, seed)

    def loss(model: nn.Module, pages: Tensor) -> Tensor:
        losses, rebuilt = read(model, pages, segment)
        return losses.mean() + rebuilt

    pages = Pages(setting["steps"] * setting["batch"], setting["pages"], seed)
    plan = TrainingPlan(
        epochs=1, batch_size=setting["batch"], learning_rate=setting["rate"], warmup=0.1, clip=1.0, seed=seed
    )
    train(model, pages, loss, plan, progress=False)
    numbers: dict[str, Any] = {"parameters": parameters(model), "first": {}, "second": {}}

    def measured(pages: Tensor) -> Tensor:
        return torch.cat([read(model, part, segment)[0] for part in pages.split(64)])

    with torch.inference_mode():
        for lag in LAGS:
            both = copies(measured(twice(lag, count)), lag)
            for copy, losses in zip(("first", "second"), both, strict=True):
                numbers[copy][str(lag)] = [round(x, 4) for x in losses.tolist()]
        text = characters("dev")
        starts = torch.randint(len(text) - PAGE, (count, 1), generator=torch.Generator().manual_seed(2))
        numbers["plain"] = round(measured(text[starts + torch.arange(PAGE)])[:, PAGE // 2 :].mean().item(), 4)
        if name == "softmax":
            numbers["context"] = [round(x, 4) for x in by_context(model, 4 * count)]
    return Outcome(numbers)


# -------------------------------------------------------------------------------- reading what was recorded


def runs_of(summary: dict[str, Any], model: str, pages: str = "repeats") -> list[dict[str, Any]]:
    """The runs of one model, one a seed.

    Raises:
        ValueError: a model that is not recorded on these pages.
    """
    found = [run for run in summary["runs"] if (run["setting"]["model"], run["setting"]["pages"]) == (model, pages)]
    if not found:
        raise ValueError(f"no run of model {model!r} on {pages!r} pages is recorded; models are {', '.join(REACH)}")
    return found


def by_lag(summary: dict[str, Any], model: str, copy: str = "second", known: int = KNOWN) -> dict[int, list[float]]:
    """{lag: one loss a seed}, nats per character of the "first" or "second" copy, without its first `known`."""
    found = runs_of(summary, model)
    return {lag: [sum(run[copy][str(lag)][known:]) / (PASSAGE - known) for run in found] for lag in LAGS}


def by_position(summary: dict[str, Any], model: str, lag: int, copy: str = "second") -> list[float]:
    """Loss (nats) of each character of a copy, mean over the seeds."""
    found = runs_of(summary, model)
    return [sum(column) / len(found) for column in zip(*(run[copy][str(lag)] for run in found), strict=True)]


COMMON = {"batch": 12, "rate": 4e-3, "passages": 256}
STUDY = Study(
    name="printed_twice",
    question="Up to which distance does each attention remember a passage that comes a second time?",
    run=run,
    recorded=(
        *({"model": name, "pages": "repeats", "steps": 600, **COMMON} for name in REACH),
        {"model": "softmax", "pages": "plain", "steps": 900, **COMMON},
    ),
    full=(
        *({"model": name, "pages": "repeats", "steps": 4_000, **COMMON} for name in REACH),
        {"model": "softmax", "pages": "plain", "steps": 8_000, **COMMON},
    ),
    seeds=(0, 1, 2),
    minutes=15,
)
