"""What is kept, and the reasons."""
