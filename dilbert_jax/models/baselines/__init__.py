"""The systems that the paper compares DILBERT with: a file for each, on the shared streams and heads."""
