"""Explorers: small widgets in which a student turns a knob and sees numbers of the course move.

`style` holds the one look of all figures, `picture` the base class of every explorer; each other module
holds one explorer. Nothing is imported here: ask for the module you need, for example
`from effnlp_lessons.widgets.cost_explorer import CostExplorer`.
"""
