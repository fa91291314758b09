"""One noun of the API per module. A resource builds a call and hands it to its client's engine; nothing else."""
