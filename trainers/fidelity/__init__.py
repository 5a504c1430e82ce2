"""Fidelity: how real, how faithful, how varied and how much copied a model's pictures are."""
