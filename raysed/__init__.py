"""Semantic segmentation of aerial and satellite tiles on a Ray cluster, with active selection of what to train on."""

__version__ = "0.1.0"
