"""From data to a checkpoint and its figures: recipe -> frames -> batches -> objective -> loop."""
