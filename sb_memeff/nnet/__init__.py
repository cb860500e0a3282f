"""Building blocks that trade stored activations for computation."""
