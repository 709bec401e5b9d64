"""What a rounding error costs, token by token: the gradient of the dense model's own predictions.

An error e at some output changes the model's distribution by a divergence of about (g · e)² / 2, where g is the
gradient of log p(y) there and y a label drawn from the model itself (its Fisher information; GuidedQuant and YAQA use
the same fact).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rosaq.calibrate.blocks import BlockModel
from rosaq.models import Site

Tensors = dict[str, Tensor]
_SEQUENCES_AT_ONCE = 2  # with gradients: what autograd keeps of them is many times their hidden states
_SEQUENCES_IN_A_RUN = 8  # without
_TOKENS_AT_ONCE = 512  # whose logits exist at the same time: a row of them is as wide as the vocabulary
_SPAN = 256  # of the vocabulary


@dataclass(frozen=True)
class SiteGradients:
    """A few tokens at one site of block `index`: what its linears read, x [tokens, k], and the gradient of log p(y) at
    the output of each of them, slopes {linear: [tokens, n]}. Of a mixture's expert: tokens that were routed to it."""

    index: int
    site: Site
    x: Tensor
    slopes: Tensors

    def squares(self) -> Tensor:
        """|g|² [tokens], over the outputs of all linears of the site."""
        return torch.stack([g.float().square().sum(-1) for g in self.slopes.values()]).sum(0)


def site_gradients(
    model: BlockModel,
    weights: Callable[[int], Tensors],
    gain: Tensor,
    head: Tensor,
    hidden: Tensor,
    generator: torch.Generator,
) -> Iterator[SiteGradients]:
    """The gradients at all sites of every block, from the last block to the first, two sequences at a time.

    weights(i): the dense tensors of block i. gain [d], head [vocab, d]: of the final norm and the head. hidden
    [batch, length, d]: after the embedding. One forward sweep over the blocks and one back; memory holds the hidden
    states of every block for this batch, in bfloat16 where products are, and one block.
    """
    states = _states(model, weights, hidden)
    gradient = _of_predictions(model, gain, head, states.pop(), generator)
    for index in reversed(range(model.sizes.num_blocks)):
        tensors, before = weights(index), []
        parts = zip(states.pop().split(_SEQUENCES_AT_ONCE), gradient.split(_SEQUENCES_AT_ONCE), strict=True)
        for given, slope in parts:
            own, found = _through_block(model, index, tensors, given, slope)
            before.append(own)
            yield from found
        gradient = torch.cat(before)


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
    model: BlockModel, index: int, weights: Tensors, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, list[SiteGradients]]:
    """(gradient at the block's input, those at its sites) from the gradient at its output."""
    leaf = hidden.to(torch.float32, copy=True).requires_grad_()
    out, outputs, inputs = model.forward_with_outputs(index, weights, leaf)
    names = list(outputs)
    own, *found = torch.autograd.grad(out, [leaf, *(outputs[name] for name in names)], gradient)
    slopes = {name: g.flatten(0, -2) for name, g in zip(names, found, strict=True)}
    return own, [
        SiteGradients(index, site, inputs[site.name].x, {name: slopes[name] for name in site.linears})
        for site in model.family.sites
        if site.name in inputs  # else no token was routed to this expert
    ]
