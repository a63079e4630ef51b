"""The lecture on efficient architectures: mixture of experts and state spaces."""
