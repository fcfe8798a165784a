"""Penumbra beside other servers and MONAI's stitching: `python -m benchmarks.peers` (docs/measure/peers.md)."""
