"""Where a router's tokens go: the experts' buffers fill in order, and what is too much is dropped (notebook 12).

GShard (Lepikhin et al. 2020, arXiv 2006.16668; `architectures.gshard`) gives each expert C = factor x k x S / E places
for the S tokens of a group. First choices are placed in the order of the tokens, then second choices behind them; who
comes after place C is refused. A token that no expert takes is carried by the residual alone. Places that nobody takes
are computed all the same, as zeros. The Switch Transformer (Fedus et al. 2021, arXiv 2101.03961) routes by k = 1.

The scores are made up, and the same every time: a token keeps its scores when other tokens or experts are added, and
with them its random number r. Skew s takes s ln(e + 1) from the score of expert e = 0, 1, ...: its gate is divided by
(e + 1)^s before the gates are made to sum to 1.

NOTE as in the paper a second choice that is not drawn (policy "random") takes its number in the queue all the same, and
so leaves a hole in the buffer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from ipywidgets import FloatSlider, HBox, IntSlider, Layout, ToggleButtons, Widget
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.architectures.gshard import expert_capacity, gshard_routing, switch_routing
from effnlp_lessons.widgets.picture import Explorer
from effnlp_lessons.widgets.router_picture import MOST_TOKENS, NOT_DRAWN, REFUSED, TAKEN, RouterPicture

LEAST_TOKENS = 4
EXPERTS = (4, 8, 16)
POLICIES = ("all", "random")
TOP_K = {2: "top-2 (GShard)", 1: "top-1 (Switch)"}
STEP = 0.25  # of the two sliders below; exact in binary
FACTORS = tuple(STEP * place for place in range(1, 17))
SKEWS = tuple(STEP * place for place in range(13))


@functools.cache
def _made_up() -> tuple[Tensor, Tensor]:
    """Scores (MOST_TOKENS, experts) from N(0, 1) and r of each token from U(0, 1), for all tokens and experts."""
    generator = torch.Generator().manual_seed(12)
    scores = torch.randn(MOST_TOKENS, EXPERTS[-1], generator=generator)
    return scores, torch.rand(MOST_TOKENS, generator=generator)


def made_up_logits(tokens: int, experts: int, skew: float) -> Float[Tensor, "tokens experts"]:
    """Scores of the first `tokens` tokens for the first `experts` experts, less skew x ln(1, 2, 3, ...)."""
    return _made_up()[0][:tokens, :experts] - skew * torch.arange(1, experts + 1).log()


def made_up_draws(tokens: int) -> Float[Tensor, " tokens"]:
    """r of the first `tokens` tokens: the second expert is asked where twice its weight is larger."""
    return _made_up()[1][:tokens]


class RouterExplorer(Explorer):
    """Change the number of tokens and the capacity; see who is placed where, refused, or left to the residual.

    Args:
        tokens: S, of a group, 4 to 48.
        experts: E: 4, 8 or 16.
        capacity_factor: 0.25 to 4 in steps of 0.25; 1: as many places as choices.
        top_k: experts that a token chooses: 2 (GShard) or 1 (Switch).
        policy: which second experts are asked: "all", or "random" where twice the weight is above r.
        skew: of the gates, 0 to 3 in steps of 0.25; 0: no expert is preferred.

    Raises:
        ValueError: a choice that is not offered.
    """

    size = (9.0, 5.5)
    scene = ("experts",)

    def __init__(
        self,
        tokens: int = 32,
        experts: int = 8,
        capacity_factor: float = 2.0,
        top_k: int = 2,
        policy: str = "all",
        skew: float = 0.0,
    ) -> None:
        steps = f"in steps of {STEP}"
        for name, value, allowed, words in (
            ("tokens", tokens, range(LEAST_TOKENS, MOST_TOKENS + 1), f"in {LEAST_TOKENS} .. {MOST_TOKENS}"),
            ("experts", experts, EXPERTS, "one of 4, 8, 16"),
            ("capacity_factor", capacity_factor, FACTORS, f"in {FACTORS[0]:g} .. {FACTORS[-1]:g} {steps}"),
            ("top_k", top_k, TOP_K, "1 or 2"),
            ("policy", policy, POLICIES, "'all' or 'random'"),
            ("skew", skew, SKEWS, f"in {SKEWS[0]:g} .. {SKEWS[-1]:g} {steps}"),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {words}, got {value!r}")
        self._picture = RouterPicture()
        super().__init__(
            {
                "tokens": _slider(IntSlider, "tokens in the group", tokens, LEAST_TOKENS, MOST_TOKENS, 1),
                "capacity_factor": _slider(FloatSlider, "capacity factor", capacity_factor, FACTORS[0], FACTORS[-1]),
                "skew": _slider(FloatSlider, "skew of the gates", skew, SKEWS[0], SKEWS[-1]),
                "experts": _buttons("experts", EXPERTS, experts),
                "top_k": _buttons("routing", [(words, k) for k, words in TOP_K.items()], top_k),
                "policy": _buttons("second experts asked", POLICIES, policy),
            }
        )

    def arrange(self) -> list[Widget]:
        rows = (("tokens", "capacity_factor", "skew"), ("experts", "top_k", "policy"))
        wrap = Layout(flex_flow="row wrap")
        return [HBox([self.controls[name] for name in row], layout=wrap) for row in rows]

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return {"policy"} if numbers["top k"] == 1 else set()

    # ------------------------------------------------------------------------ numbers

    def numbers(
        self, tokens: int, experts: int, capacity_factor: float, top_k: int, policy: str, skew: float
    ) -> dict[str, Any]:
        """Who goes where, and what that costs. Experts and tokens are numbered from 0.

        "chosen", "places" and "status" by (token, choice): the expert; the place in its queue, beyond the buffer too;
        and TAKEN, REFUSED (no place left) or NOT_DRAWN (not asked). "capacity": C, places of one expert; "uncapped":
        what the formula gives before it is held to the S tokens. "lost": the tokens that no expert takes. "partly":
        how many have one expert of two. By expert: "filled" places, "refused" choices, "share" of the tokens whose
        first choice it is, placed or not, and "mean gate". "slots" places of all experts, "wasted" of them hold zeros.
        "auxiliary loss" in the scales "paper" (1 / E² if balanced) and "switch" (1).
        """
        logits = made_up_logits(tokens, experts, skew)[None]
        capacity = expert_capacity(tokens, experts, capacity_factor, top_k)
        if top_k == 1:
            routing, queues = switch_routing(logits, capacity), switch_routing(logits, tokens)
            asked = torch.ones_like(queues.positions, dtype=torch.bool)
            losses = {"paper": routing.auxiliary_loss / experts**2, "switch": routing.auxiliary_loss}
        else:
            draws = made_up_draws(tokens)[None]
            routing = gshard_routing(logits, capacity, policy=policy, draws=draws)
            # with room for all, a choice has its place in the queue, or none if it is not asked
            queues = gshard_routing(logits, tokens, policy="all", aux_scale="switch")
            asked = gshard_routing(logits, tokens, policy=policy, draws=draws).positions >= 0
            losses = {"paper": routing.auxiliary_loss, "switch": queues.auxiliary_loss}
        taken = routing.positions >= 0
        status = torch.where(taken, TAKEN, torch.where(asked, REFUSED, NOT_DRAWN))
        placed = taken.sum(1)
        filled, refused = (
            torch.bincount(routing.experts[status == kind], minlength=experts) for kind in (TAKEN, REFUSED)
        )
        slots = experts * capacity
        return {
            "tokens": tokens,
            "experts": experts,
            "capacity factor": capacity_factor,
            "top k": top_k,
            "policy": policy,
            "skew": skew,
            "capacity": capacity,
            "uncapped": capacity_factor * top_k * tokens / experts,
            "chosen": routing.experts.numpy(),
            "places": queues.positions.numpy(),
            "status": status.numpy(),
            "choices": status.numel(),
            "refused choices": int(refused.sum()),
            "not drawn": int((status == NOT_DRAWN).sum()),
            "lost": (placed == 0).nonzero()[:, 0].tolist(),
            "partly": int(((placed > 0) & (placed < top_k)).sum()),
            "filled": filled.numpy(),
            "refused": refused.numpy(),
            "share": (routing.counts / tokens).numpy(),
            "mean gate": logits[0].softmax(-1).mean(0).numpy(),
            "slots": slots,
            "wasted": slots - int(filled.sum()),
            "auxiliary loss": {scale: loss.item() for scale, loss in losses.items()},
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        losses = numbers["auxiliary loss"]
        words = {
            "heading": _heading(numbers),
            "capacity": _capacity(numbers),
            "refused": _part(numbers["refused choices"], numbers["choices"]),
            "lost": _part(len(numbers["lost"]), numbers["tokens"]),
            "wasted": _part(numbers["wasted"], numbers["slots"]),
            "loss": f"{losses['paper']:.4f} (paper), {losses['switch']:.2f} (Switch)",
        }
        self._picture.draw(numbers, words)

    def summary(self, numbers: dict[str, Any]) -> str:
        two, losses = numbers["top k"] == 2, numbers["auxiliary loss"]
        drawn = f", second experts asked: {numbers['policy']}" if two else ""
        refused = f"Refused: {_part(numbers['refused choices'], numbers['choices'])} choices"
        if two and numbers["policy"] == "random":
            refused += f"; not drawn: {numbers['not drawn']}"
        lost = f"without an expert, on the residual alone: {_part(len(numbers['lost']), numbers['tokens'])} tokens"
        partly = f", with one expert of two: {numbers['partly']}" if two else ""
        queues = numbers["filled"] + numbers["refused"]
        fullest = int(queues.argmax())
        return (
            f"{_heading(numbers)} {numbers['tokens']} tokens, {numbers['experts']} experts, {TOP_K[numbers['top k']]}"
            f"{drawn}, skew {numbers['skew']:g}. {_capacity(numbers)}. {refused}; {lost}{partly}. Empty places, "
            f"computed as zeros: {_part(numbers['wasted'], numbers['slots'])}. Most asked: expert {fullest}, by "
            f"{queues[fullest]} tokens (C = {numbers['capacity']}); first choice of "
            f"{100 * numbers['share'][fullest]:.1f} %, mean gate {numbers['mean gate'][fullest]:.3f}. Auxiliary loss "
            f"{losses['paper']:.4f} in the paper's scale (balanced: {1 / numbers['experts'] ** 2:.4f}), "
            f"{losses['switch']:.2f} in Switch's (balanced: 1)."
        )

    def describe(self, numbers: dict[str, Any]) -> str:
        lost = ", ".join(map(str, numbers["lost"])) or "none"
        columns = zip(*(numbers[name] for name in ("filled", "refused", "share", "mean gate")), strict=True)
        by_expert = "; ".join(
            f"{expert}: {filled} filled, {refused} refused, {share:.3f}, {gate:.3f}"
            for expert, (filled, refused, share, gate) in enumerate(columns)
        )
        return (
            "Above the tokens in order with the experts they choose; refused choices are struck through, and an arrow "
            f"leads from each token without an expert down to the line of the residual: {lost}. Below a row of places "
            "for each expert, framed as far as its buffer goes, filled with first and then second choices; empty ones "
            "are striped, refused ones stand behind the frame. Beside it bars of the share of first choices and of the "
            f"mean gate. By expert: {by_expert}. {self.summary(numbers)}"
        )


def _part(some: int, of: int) -> str:
    return f"{some} of {of} ({100 * some / of:.1f} %)"


def _heading(numbers: dict[str, Any]) -> str:
    lost, tokens, refused = len(numbers["lost"]), numbers["tokens"], numbers["refused choices"]
    if lost == 1:
        return f"1 of {tokens} tokens finds no expert: the residual alone carries it."
    if lost:
        return f"{lost} of {tokens} tokens find no expert: the residual alone carries them."
    if refused:
        return f"All {tokens} tokens find an expert, but {refused} of their choices {_are(refused)} refused."
    return f"All {tokens} tokens find a place with every expert that they ask."


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _capacity(numbers: dict[str, Any]) -> str:
    formula = f"{numbers['capacity factor']:g} x {numbers['top k']} x {numbers['tokens']} / {numbers['experts']}"
    if numbers["uncapped"] > numbers["tokens"]:
        return f"Places of an expert: C = {numbers['capacity']}, all tokens, for {formula} = {numbers['uncapped']:g}"
    rounded = "" if numbers["uncapped"] == numbers["capacity"] else ", rounded up"
    return f"Places of an expert: C = {formula} = {numbers['capacity']}{rounded}"


def _slider(kind: type, words: str, value: float, least: float, most: float, step: float = STEP) -> Widget:
    return kind(
        value=value,
        min=least,
        max=most,
        step=step,
        description=words,
        style={"description_width": "initial"},
        layout=Layout(width="290px", margin="2px 8px 2px 2px"),
    )


def _buttons(words: str, options: Any, value: Any) -> ToggleButtons:
    return ToggleButtons(
        options=[option if isinstance(option, tuple) else (str(option), option) for option in options],
        value=value,
        description=words,
        style={"button_width": "auto", "description_width": "initial"},
        layout=Layout(width="max-content", max_width="100%", margin="2px 16px 2px 0"),
    )
