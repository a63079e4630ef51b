"""Layers that a test makes draw their weights from torch's global generator: every test begins at one place of it."""

import torch


def pytest_runtest_setup(item):
    torch.manual_seed(0)
