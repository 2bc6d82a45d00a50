"""Looking inside and ahead: token maps, what a run will need, what it did."""
