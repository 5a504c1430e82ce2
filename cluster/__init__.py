"""Where a run lives: object storage, MLflow, Ray. Imports nothing of the other folders."""
