"""A rehearsal of the CUDA path without a GPU: docs/gpu-rehearsal.md."""
