"""Where values and pictures of a run go."""
