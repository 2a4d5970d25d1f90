"""What services need to know of a Hugging Face model folder. Imports no torch."""
