"""Fused operations: each file holds a formula, the plain PyTorch that it equals, the kernel, and the dispatcher."""
