"""Where a run's metrics and pictures are written: JSON lines, TensorBoard."""
