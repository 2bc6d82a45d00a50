"""Does it work?  Arms of a small comparison, run with seeds, measured, and written up from their rows."""
