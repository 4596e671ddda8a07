"""Will a training step fit, and what does it send? Answered without an accelerator."""
