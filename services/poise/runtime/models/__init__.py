"""Facts about Hugging Face models that several services need. Imports no torch."""
