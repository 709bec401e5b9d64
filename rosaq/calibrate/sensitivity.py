"""What a rounding error costs, token by token: squared gradients of the dense model's own predictions.

An error e at some output changes the model's distribution by a divergence of about (g · e)² / 2, where g is the
gradient of log p(y) there and y a label drawn from the model itself (its Fisher information; GuidedQuant and YAQA use
the same fact). What is kept is |g|² of every token at the outputs of every site, and at the output of every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rosaq.calibrate.blocks import BlockModel, SiteInput

Tensors = dict[str, Tensor]
BLOCK = "block"  # name of the block's own output beside those of its linears
_SEQUENCES_AT_ONCE = 2
_TOKENS_AT_ONCE = 512  # whose logits exist at the same time: a row of them is as wide as the vocabulary


@dataclass(frozen=True)
class Sensitivity:
    """Of block `index`: squares {linear or BLOCK: |g|² of every token at its output [batch, length]}, 0 at an expert
    for tokens that were not routed to it; inputs {site name: its input}, without experts that no token reached."""

    index: int
    squares: Tensors
    inputs: dict[str, SiteInput]


def output_sensitivity(
    model: BlockModel,
    weights: Callable[[int], Tensors],
    gain: Tensor,
    head: Tensor,
    hidden: Tensor,
    generator: torch.Generator,
) -> Iterator[Sensitivity]:
    """The sensitivity of every block, from the last to the first.

    weights(i): the dense tensors of block i. gain [d], head [vocab, d]: of the final norm and the head. hidden
    [batch, length, d]: after the embedding. One forward sweep over the blocks and one back; memory holds the hidden
    states of every block for this batch, and one block.
    """
    states = _states(model, weights, hidden)
    gradient = _of_predictions(model, gain, head, states.pop(), generator)
    for index in reversed(range(model.sizes.num_blocks)):
        gradient, found = _through_block(model, index, weights(index), states.pop(), gradient)
        yield found


def output_gradients(
    model: BlockModel,
    weights: Callable[[int], Tensors],
    gain: Tensor,
    head: Tensor,
    hidden: Tensor,
    generator: torch.Generator,
) -> Iterator[tuple[int, Tensor]]:
    """(block, gradient of the summed log p(y) at its output [batch, length, d]), from the last block to the first;
    arguments, labels y and memory as of `output_sensitivity`."""
    states = _states(model, weights, hidden)
    gradient = _of_predictions(model, gain, head, states.pop(), generator)
    for index in reversed(range(model.sizes.num_blocks)):
        yield index, gradient
        before, found = states.pop(), []
        tensors = weights(index) if index else {}  # nothing asks for the gradient of the embedded text
        parts = zip(before.split(_SEQUENCES_AT_ONCE), gradient.split(_SEQUENCES_AT_ONCE), strict=True)
        for given, slope in parts if index else ():
            leaf = given.clone().requires_grad_()
            found.append(torch.autograd.grad(model.forward(index, tensors, leaf), leaf, slope)[0])
        gradient = torch.cat(found) if found else gradient


def _states(model: BlockModel, weights: Callable[[int], Tensors], hidden: Tensor) -> list[Tensor]:
    """Hidden states before every block, and behind the last one."""
    states = [hidden]
    for index in range(model.sizes.num_blocks):
        states.append(model.run(index, weights(index), states[-1]))
    return states


def _of_predictions(
    model: BlockModel, gain: Tensor, head: Tensor, hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient of the summed log p(y) with respect to the last block's output [batch, length, d]."""
    found = []
    for part in hidden.flatten(0, 1).split(_TOKENS_AT_ONCE):
        leaf = part.clone().requires_grad_()
        normed = model.final_norm(leaf, gain)
        with model.products():
            probabilities = (normed.detach() @ head.T).float().softmax(-1)
            expected = (probabilities @ head).float()
        # drawn on the CPU: a seed means the same labels on every device
        labels = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(head.device)
        found.append(torch.autograd.grad(normed, leaf, head[labels] - expected)[0])
    return torch.cat(found).view_as(hidden)


def _through_block(
    model: BlockModel, index: int, weights: Tensors, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, Sensitivity]:
    """(gradient at the block's input, its sensitivity) from the gradient at its output."""
    parts = zip(hidden.split(_SEQUENCES_AT_ONCE), gradient.split(_SEQUENCES_AT_ONCE), strict=True)
    found = [_through_block_at_once(model, index, weights, *part) for part in parts]
    squares = {name: torch.cat([each[name] for _, each, _ in found]) for name in found[0][1]}
    inputs = _joined([each for _, _, each in found], _SEQUENCES_AT_ONCE * hidden.shape[1])
    squares[BLOCK] = gradient.square().sum(-1)
    return torch.cat([part for part, _, _ in found]), Sensitivity(index, squares, inputs)


def _through_block_at_once(
    model: BlockModel, index: int, weights: Tensors, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensors, dict[str, SiteInput]]:
    """(gradient, |g|², inputs) for a few sequences: what autograd keeps of them is many times their hidden states."""
    leaf = hidden.clone().requires_grad_()
    out, outputs, inputs = model.forward_with_outputs(index, weights, leaf)
    names = list(outputs)
    found = torch.autograd.grad(out, [leaf, *(outputs[name] for name in names)], gradient)
    squares = {name: g.float().square().sum(-1) for name, g in zip(names, found[1:], strict=True)}
    for site in model.family.sites:
        for name in site.linears if site.expert is not None else ():
            everywhere = torch.zeros(hidden.shape[:2], device=hidden.device)
            if name in squares:
                everywhere.view(-1)[inputs[site.name].tokens] = squares[name]
            squares[name] = everywhere
    return found[0], squares, inputs


def _joined(parts: list[dict[str, SiteInput]], tokens_each: int) -> dict[str, SiteInput]:
    """The inputs of all parts of a batch, of so many tokens each but the last, as one."""
    result: dict[str, SiteInput] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        own = [(i * tokens_each, part[name]) for i, part in enumerate(parts) if name in part]
        tokens = [start + given.tokens for start, given in own if given.tokens is not None]
        result[name] = SiteInput(torch.cat([given.x for _, given in own]), torch.cat(tokens) if tokens else None)
    return result
