"""The op by itself: pack codes, run one launch, compare with plain PyTorch."""

import torch

import rosaq
from rosaq.layout import dequantize

n, k, bits, group_size = 512, 1024, 3, 64
codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
scales = torch.rand(n, k // group_size).half() / 64
zeros = torch.full((n, k // group_size), 4, dtype=torch.uint8)
qweight = rosaq.ops.pack(codes, bits)
packed = rosaq.ops.prepack(qweight, scales, zeros, bits)
x = torch.randn(2, k)
y = rosaq.ops.fused_gemm(x, packed, out_features=n, bits=bits, group_size=group_size, symmetric=False)
print("largest difference:", float((y - x @ dequantize(qweight, scales, zeros, bits).T).abs().max()))
