"""Quantization: weights and activations in a few bits; one paper, one module."""
