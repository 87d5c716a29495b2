"""What every operator stands on: schemas and the door to the kernels, the choice of a backend, checks, tensors."""
