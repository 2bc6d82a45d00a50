"""What the ranks of a run tell each other in a step, how long that takes on a cluster, and what hides behind what."""
