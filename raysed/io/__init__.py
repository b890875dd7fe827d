"""Bytes, files and object storage: no Ray."""
