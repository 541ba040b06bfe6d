"""What is done when something goes wrong."""
