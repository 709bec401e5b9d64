"""What a rounding error costs, token by token: squared gradients of the dense model's own predictions.

An error e at some output changes the model's distribution by a divergence of about (g · e)² / 2, where g is the
gradient of log p(y) there and y a label drawn from the model itself (its Fisher information; GuidedQuant and YAQA use
the same fact). What is kept is g at the output of every block, and |g|² of every token at the outputs of every site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rosaq.calibrate.blocks import BlockModel, SiteInput

Tensors = dict[str, Tensor]
BLOCK = "block"  # name of the block's own output beside those of its linears
_SEQUENCES_AT_ONCE = 2  # with gradients
_SEQUENCES_IN_A_RUN = 8  # without
_TOKENS_AT_ONCE = 512  # whose logits exist at the same time: a row of them is as wide as the vocabulary
_SPAN = 256  # of the vocabulary


@dataclass(frozen=True)
class Sensitivity:
    """Of block `index`: gradient [batch, length, d] at its output, of all sequences. Of those that were measured:
    squares {linear or BLOCK: |g|² of every token at its output [batch, length]}, 0 at an expert for tokens that were
    not routed to it; inputs {site name: its input}, without experts that no token reached."""

    index: int
    gradient: Tensor
    squares: Tensors
    inputs: dict[str, SiteInput]


def output_sensitivity(
    model: BlockModel,
    weights: Callable[[int], Tensors],
    gain: Tensor,
    head: Tensor,
    hidden: Tensor,
    generator: torch.Generator,
    measured: int | None = None,
) -> Iterator[Sensitivity]:
    """The sensitivity of every block, from the last to the first.

    weights(i): the dense tensors of block i. gain [d], head [vocab, d]: of the final norm and the head. hidden
    [batch, length, d]: after the embedding. measured: sequences whose squares and inputs are wanted, the first ones;
    None: all. One forward sweep over the blocks and one back; memory holds the hidden states of every block for this
    batch, in bfloat16 where products are, and one block.
    """
    measured = len(hidden) if measured is None else measured
    states = _states(model, weights, hidden)
    gradient = _of_predictions(model, gain, head, states.pop(), generator)
    for index in reversed(range(model.sizes.num_blocks)):
        before, found = _through_block(model, index, weights(index), states.pop(), gradient, measured)
        yield found
        gradient = before


def _states(model: BlockModel, weights: Callable[[int], Tensors], hidden: Tensor) -> list[Tensor]:
    """Hidden states before every block, and behind the last one."""
    held = torch.bfloat16 if model.is_bf16 else hidden.dtype
    states = [hidden.to(held)]
    for index in range(model.sizes.num_blocks):
        tensors = weights(index)
        after = [model.run(index, tensors, part.float()) for part in states[-1].split(_SEQUENCES_IN_A_RUN)]
        states.append(torch.cat([part.to(held) for part in after]))
    return states


def _of_predictions(
    model: BlockModel, gain: Tensor, head: Tensor, hidden: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient of the summed log p(y) with respect to the last block's output [batch, length, d]."""
    found = []
    for part in hidden.flatten(0, 1).split(_TOKENS_AT_ONCE):
        leaf = part.to(torch.float32, copy=True).requires_grad_()
        normed = model.final_norm(leaf, gain)
        with model.products():
            probabilities = (normed.detach() @ head.T).float().softmax(-1)
            expected = (probabilities @ head).float()
        labels = drawn_labels(probabilities, generator)
        found.append(torch.autograd.grad(normed, leaf, head[labels] - expected)[0])
    return torch.cat(found).view_as(hidden)


def drawn_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One label for every row of probabilities [tokens, vocab]: where their running sum passes a number drawn on the
    CPU, so that a seed means the same labels on every device (but where a sum comes within rounding of its number).
    Whole spans of the vocabulary are passed first: one running sum over all of it is slow, and on a GPU not the same
    twice."""
    vocab = probabilities.shape[1]
    spans = pad(probabilities, (0, -vocab % _SPAN)).view(len(probabilities), -1, _SPAN)
    sums = spans.sum(-1).double().cpu().cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    span = torch.searchsorted(sums, drawn, right=True).clamp_max_(sums.shape[1] - 1)
    chosen = span.to(spans.device)[..., None].expand(-1, -1, _SPAN)
    inside = spans.gather(1, chosen)[:, 0].double().cpu().cumsum(-1)
    past = drawn - sums.gather(1, span) + inside[:, -1:]
    label = span * _SPAN + torch.searchsorted(inside, past, right=True).clamp_max_(_SPAN - 1)
    return label[:, 0].clamp_max_(vocab - 1).to(spans.device)


def _through_block(
    model: BlockModel, index: int, weights: Tensors, hidden: Tensor, gradient: Tensor, measured: int
) -> tuple[Tensor, Sensitivity]:
    """(gradient at the block's input, its sensitivity) from the gradient at its output."""
    first = _pairs(hidden[:measured], gradient[:measured])
    found = [_through_block_at_once(model, index, weights, *part) for part in first]
    before = [part for part, _, _ in found]
    if index:  # nothing asks for the gradient at the embedded text
        for given, slope in _pairs(hidden[measured:], gradient[measured:]):
            leaf = given.to(torch.float32, copy=True).requires_grad_()
            before.append(torch.autograd.grad(model.forward(index, weights, leaf), leaf, slope)[0])
    squares = {name: torch.cat([each[name] for _, each, _ in found]) for name in (found[0][1] if found else ())}
    inputs = _joined([each for _, _, each in found], _SEQUENCES_AT_ONCE * hidden.shape[1])
    squares[BLOCK] = gradient[:measured].square().sum(-1)
    return torch.cat(before) if before else gradient, Sensitivity(index, gradient, squares, inputs)


def _pairs(hidden: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A few sequences of both at once: what autograd keeps of them is many times their hidden states."""
    parts = hidden.split(_SEQUENCES_AT_ONCE), gradient.split(_SEQUENCES_AT_ONCE)
    return [pair for pair in zip(*parts, strict=True) if len(pair[0])]  # splitting nothing gives one empty part


def _through_block_at_once(
    model: BlockModel, index: int, weights: Tensors, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensors, dict[str, SiteInput]]:
    """(gradient, |g|², inputs) for a few sequences."""
    leaf = hidden.to(torch.float32, copy=True).requires_grad_()
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
