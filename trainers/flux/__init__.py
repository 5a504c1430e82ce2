"""FLUX.1 (Black Forest Labs): loading, packing and drawing. Nothing here knows of Ray, MLflow, the loop or ranks."""
