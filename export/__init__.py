"""From a checkpoint to an artifact that is proved to reproduce it."""
