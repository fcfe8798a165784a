"""Open Inference Protocol v2: what it asks and answers, its tensors, and its gRPC service.

Its REST routes are in `penumbra.serving.http.v2`; nothing here knows pictures' files or media types.
"""
