"""Does 16-bit training match FP32? The same loop under several policies, with the same seeds."""
