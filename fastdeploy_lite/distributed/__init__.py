"""What the ranks of one model say to each other."""
