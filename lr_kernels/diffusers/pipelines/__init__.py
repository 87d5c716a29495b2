"""The pipelines of Layout-and-Retouch: their call, its stages, and the models that they run."""
