"""One linear of your own model in 3 bits, calibrated on its own inputs; the rest stays as it is."""

import torch
from torch import nn

from rosaq import QuantSpec, RosaqLinear

model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
torch.set_grad_enabled(False)
x = torch.randn(4096, 256)
before, hidden = model(x), model[:2](x).detach().double()
gram = hidden.T @ hidden / len(hidden)  # second moments of the inputs of model[2]
salient = gram.diagonal().topk(8).indices  # the eight strongest channels stay in 16 bits
model[2] = RosaqLinear.from_linear(model[2], gram, QuantSpec(bits=3, group_size=64), salient_index=salient)
print(f"{model[2].bits_per_weight:.2f} bits per weight,", model[2])
print(f"relative error of the model: {float((model(x) - before).norm() / before.norm()):.3f}")
