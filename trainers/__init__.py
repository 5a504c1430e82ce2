"""Training: the recipe, the loop, the engines, the objectives and the models themselves."""
