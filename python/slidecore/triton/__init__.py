"""GPU kernels, one operation a file. They are imported only where Triton is installed.

Every operation is a PyTorch operator (`torch.ops.slidecore.*`) with a fake implementation. On a card it runs its
kernel; CPU tensors take a reference written with PyTorch's own operations, unless Triton's interpreter runs the kernels
(TRITON_INTERPRET=1, as in the tests).

Every kernel runs without what only one vendor has: no vendor's library functions, no warp size. One shortcut is for
NVIDIA's cards alone, an approximate reciprocal that is corrected to the same bits (`_usual`); `adamw` does not take it
elsewhere. What a compiler may contract to a fused multiply-add is switched off where results are compared bit by bit
(`adamw`).

Launches of the streaming kernels are chosen for each card and shape by `python -m slidecore.triton.tune` and stored
(`tuning`); nothing is timed in a training step. The cross-entropy kernel and the head's tiles follow rules instead
(`cross_entropy`, `linear_cross_entropy`): matrix products take nearly all of the head's time.
"""
