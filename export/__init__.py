"""What turns a checkpoint into an artifact that is proved to reproduce it.

Each format is a file of its own, and `parity` is the gate of all; nothing here trains or answers requests.
"""
