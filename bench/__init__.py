"""Speed and memory of the course, side by side with what they are compared with: `python -m bench`."""
