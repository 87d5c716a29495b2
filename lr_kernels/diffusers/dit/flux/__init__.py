"""Layout-and-Retouch (arXiv 2407.09779) with Flux: attention, stages, pipeline."""
