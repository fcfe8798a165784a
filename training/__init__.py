"""From data to a checkpoint and measured numbers: recipe -> frames -> batches -> objective -> loop -> checkpoint."""
