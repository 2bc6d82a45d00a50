"""Reference vectors: what their files hold, and this installation's numbers against theirs."""
