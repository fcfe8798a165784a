"""The way of one image, usable without a server: decode, plan, schedule, run, stitch, read out.

No transport, metrics or settings are known here.
"""
