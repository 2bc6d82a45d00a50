"""The numbers themselves: the Inception network, distances between Gaussians, precision and recall."""
