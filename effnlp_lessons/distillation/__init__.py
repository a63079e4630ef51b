"""Knowledge distillation: a small student learns from a large teacher; one paper, one module."""
