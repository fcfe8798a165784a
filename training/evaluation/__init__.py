"""Evaluate an artifact: answers come from the serving engine, so what is measured is what is served.

`answers` asks, `figures` and `intervals` count, `run` goes through frames, `shift` changes them, and `verb` is the
command; a network's weights and its training are not known here.
"""
