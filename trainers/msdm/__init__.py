"""MSDM, the compact domain model of *Prompt to Polyp* (arXiv 2505.05573).

A clinical text encoder (frozen), an 8-channel autoencoder and a U-Net that attends to the prompt embeddings.
Nothing here knows of Ray, MLflow or ranks.
"""

from typing import Any

__all__ = ["MSDMPipeline"]


def __getattr__(name: str) -> Any:
    """The pipeline is imported when it is asked for: it brings diffusers, which takes seconds."""
    if name == "MSDMPipeline":
        from trainers.msdm.pipeline import MSDMPipeline

        return MSDMPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
