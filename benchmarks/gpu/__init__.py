"""What the GPU kernels compile to, and what they take on a GPU."""
