"""Devices, process groups, seeds: the only place that touches Megatron's globals."""
