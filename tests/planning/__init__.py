"""Maps, FLOPs, plans and reports."""
