"""What only a GPU takes: the steps round a network's calls that stay on the device, and the operators in Triton."""
