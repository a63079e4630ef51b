"""Making language models cheaper: distillation, quantization, pruning, attention, architectures.

Importing this package imports nothing else. Each part is imported when it is used, for example
`from effnlp_lessons.transformer import Encoder`.
"""

__version__ = "0.1.0"
