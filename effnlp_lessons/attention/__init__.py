"""Efficient attention: one paper, one module, each with its mask (the definition) and a path without an n x n table."""
