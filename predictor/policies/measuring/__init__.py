"""What several policies measure: gradients, activations, similarity, quantized copies, learning rates by layer."""
