"""What leads from data to a checkpoint and its figures: recipe -> frames -> batches -> objective -> loop.

What a method learns is in its own folder in `penumbra.models`; nothing here is needed to serve.
"""
