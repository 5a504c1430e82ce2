"""Sweeps over recipes and over guidance scales. Imports trainers; nothing but medsynth imports it."""
