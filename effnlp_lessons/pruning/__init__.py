"""Pruning: fewer weights, heads, neurons or layers; one paper, one module."""
