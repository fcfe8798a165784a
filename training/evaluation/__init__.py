"""Evaluate an artifact: answers come from the serving engine, so what is measured is what is served.

`answers` asks, `figures` counts and `run` is the verb; a network's weights and its training are not known here.
"""
