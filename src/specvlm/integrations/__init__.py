"""Other projects' harnesses."""
