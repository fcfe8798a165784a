"""Penumbra beside other servers and MONAI's stitching: `python -m benchmarks.peers`, read with docs/peers.md."""
