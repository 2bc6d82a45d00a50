"""The verbs of `mirai-ds`, one file for each thing a user does; they join all rooms and import them when they run."""
