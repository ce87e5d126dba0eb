"""ringctx: train language models on very long documents, over any number of devices."""

__version__ = "0.1.0"
