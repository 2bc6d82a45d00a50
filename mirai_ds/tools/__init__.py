"""What users run beside training: sampling, export, verification, a look at the machine."""
