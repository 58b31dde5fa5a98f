"""What is done with a program."""
