"""Training: what one optimizer step computes, and the run directory around it."""
