"""The Selective Sample Buffer and the assembly of training batches. Numpy only."""
