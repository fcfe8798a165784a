"""Tests of what lives under `integrations/`, against a real server and the real tools."""
