"""Recorded experiments. `python -m effnlp_lessons.studies` lists them, `... studies NAME` records one.

A study is a module of this package with a `STUDY` in it; see `runner.py` for what that is.
"""
