"""Evaluation of the miniature by models from outside: docs/evaluation.md."""
