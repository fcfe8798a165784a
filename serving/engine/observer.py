"""What the engine reports while it works; `penumbra.serving.telemetry` turns it into metrics."""


class Observer:
    """Receives events, from any lane; the default ignores them."""

    def batch_done(self, model: str, *, windows: int, capacity: int, samples: int) -> None:
        """A batch of `windows` out of `capacity` windows, with `samples` samples in all, was run."""

    def out_of_memory(self, model: str) -> None:
        """A batch did not fit and is run again in halves."""

    def model_loaded(self, model: str, *, seconds: float) -> None:
        """A model was loaded, checked and warmed up."""
