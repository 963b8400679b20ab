"""Recipes: what a user writes, checked without torch. `load.load_recipe` is the way in."""
