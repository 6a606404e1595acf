"""Scores for answers: rules, the user's own functions, trained reward models, and their weighted sum."""
