"""GPU kernels, one operation a file. They are imported only where Triton is installed.

Every operation is a PyTorch operator (`torch.ops.slidecore.*`) with a fake implementation. On a card it runs its
kernel; CPU tensors take a reference written with PyTorch's own operations, unless Triton's interpreter runs the kernels
(TRITON_INTERPRET=1, as in the tests).

Nothing here is of one vendor: no inline assembly, no vendor's library functions, no warp size. What a compiler may
contract to a fused multiply-add is switched off where results are compared bit by bit (`adamw`).
"""
