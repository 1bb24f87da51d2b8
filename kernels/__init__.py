"""What runs on the device at inference: the DCT op, the networks, the engines."""
