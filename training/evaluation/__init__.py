"""Evaluation of an artifact: answers come from the serving engine, so what is measured is what is served."""
