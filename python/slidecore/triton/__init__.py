"""GPU kernels, one operation a file. They are imported only where Triton is installed and tensors are on a card."""
