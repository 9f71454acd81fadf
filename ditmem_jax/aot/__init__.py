"""Whether a configuration fits TPUs that are not there, and how fast it can be."""
