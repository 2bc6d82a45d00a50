"""Loop, step, session: training without any behaviour around it."""
