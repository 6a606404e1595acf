"""Evaluation: pure metrics, and the judgement of the embedded demo."""
