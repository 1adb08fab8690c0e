"""Who goes into the next base step: fair queue, packing, the loop."""
