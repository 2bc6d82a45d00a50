"""The paper's tables: which recipes are their rows, and measured runs beside the paper's numbers."""
