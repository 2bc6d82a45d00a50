"""What finished and running runs left on disk: compared and described.  Imports no torch."""
