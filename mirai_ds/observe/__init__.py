"""Metrics, throughput and FLOPs, and where they are written."""
