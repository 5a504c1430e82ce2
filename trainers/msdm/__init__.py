"""MSDM, the compact domain model of *Prompt to Polyp* (arXiv 2505.05573).

A clinical text encoder (frozen), an 8-channel autoencoder and a U-Net that attends to the prompt embeddings.
Nothing here knows of Ray, MLflow or ranks.
"""

from trainers.msdm.pipeline import MSDMPipeline

__all__ = ["MSDMPipeline"]
