"""Loss of a model on text or samples, and how certain it is."""
