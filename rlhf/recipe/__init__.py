"""Recipes: what a stage is asked to do, checked before anything heavy is imported."""
