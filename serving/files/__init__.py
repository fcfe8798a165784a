"""Answers to files on disks and in buckets, for `penumbra predict` and `penumbra batch`.

Nothing here knows HTTP or gRPC: the engine is called directly.
"""
