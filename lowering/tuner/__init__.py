"""The fastest configuration of the Triton kernel for a shape: measured once, kept in a file, found again."""
