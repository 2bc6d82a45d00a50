"""Fused operations, one folder an operation, each beside its plain reference; installed as `mirai_ds.kernels`."""
